//! What is handed over: a file in memory with what there is to know, one JSON document a line, each
//! with the unsent bytes of its connection behind it, and queues in which the descriptors wait.
//!
//! A queue is one end of a pair of unix sockets; the descriptors are in the messages that it has
//! not received yet. So thousands of them are a handful for whoever keeps the package. When the
//! last copy of a queue is closed, they are closed with it.

use std::fs::File;
use std::io::{self, BufRead, BufReader, BufWriter, Read, Seek, Write};
use std::os::fd::{AsFd, BorrowedFd, OwnedFd};

use anyhow::{Context, Result, bail, ensure};
use rustix::fs::{FileType, MemfdFlags, fstat, memfd_create};
use rustix::net::{RecvFlags, SendFlags};
use serde::Deserialize;

use super::{FORMAT, Listening, Offer};
use crate::kernel::descriptors::{self, IN_A_MESSAGE};
use crate::parking::{Parcel, State};

/// More queues than this are no package: the descriptors of some 280,000 connections.
const MOST_QUEUES: usize = 16;

/// See the module's description.
#[derive(Debug)]
pub struct Package {
    state: File,
    /// In no order.
    queues: Vec<OwnedFd>,
}

/// What is in a package.
#[derive(Debug)]
pub struct Contents {
    pub offer: Offer,
    pub sockets: Vec<(Listening, OwnedFd)>,
    pub parcels: Vec<Parcel>,
}

/// What every version of the state begins with.
#[derive(Deserialize)]
struct Head {
    format: u32,
    version: String,
}

impl Package {
    /// What there will be, without any of it.
    pub fn announce(offer: &Offer) -> io::Result<Self> {
        Self::write(offer, &[], &[])
    }

    /// Packs copies: whatever becomes of the package, the caller still has everything.
    pub fn pack(offer: &Offer, sockets: &[BorrowedFd<'_>], parcels: &[Parcel]) -> io::Result<Self> {
        if offer.sockets.len() != sockets.len() {
            return Err(io::Error::other("listening sockets have changed meanwhile"));
        }
        Self::write(offer, sockets, parcels)
    }

    fn write(offer: &Offer, sockets: &[BorrowedFd<'_>], parcels: &[Parcel]) -> io::Result<Self> {
        let file = memfd_create("dataplane-handover", MemfdFlags::CLOEXEC)?;
        let mut state = BufWriter::new(File::from(file));
        serde_json::to_writer(&mut state, offer)?;
        state.write_all(b"\n")?;
        for parcel in parcels {
            serde_json::to_writer(&mut state, &parcel.state)?;
            state.write_all(b"\n")?;
            state.write_all(&parcel.bytes)?;
        }
        let of_parcels = parcels.iter().flat_map(|parcel| &parcel.descriptors).map(AsFd::as_fd);
        let all: Vec<_> = sockets.iter().copied().chain(of_parcels).collect();
        Ok(Self { state: state.into_inner().map_err(io::IntoInnerError::into_error)?, queues: enqueue(&all)? })
    }

    /// What there is to know, without the connections; as often as wanted.
    pub fn offer(&self) -> Result<Offer> {
        Ok(self.read()?.0)
    }

    /// What comes first, and the rest of the file.
    fn read(&self) -> Result<(Offer, BufReader<File>)> {
        let mut file = self.state.try_clone()?;
        file.rewind()?;
        let mut file = BufReader::new(file);
        let mut first = String::new();
        ensure!(file.read_line(&mut first)? > 0, "the state is empty");
        let Head { format, version } = serde_json::from_str(&first).context("the state is not understood")?;
        ensure!(
            format == FORMAT,
            "the state of version {version} has format {format}; this version knows format {FORMAT}"
        );
        let offer = serde_json::from_str(&first)
            .with_context(|| format!("the state of version {version} is not understood by this version"))?;
        Ok((offer, file))
    }

    /// Takes everything out.
    ///
    /// # Errors
    /// Something is not understood, or missing. Then nothing was done to any connection, but where
    /// no other process has copies, they are closed and so reset.
    pub fn unpack(self) -> Result<Contents> {
        let (offer, mut file) = self.read()?;
        let mut states: Vec<(State, Vec<u8>)> = Vec::new();
        let mut line = String::new();
        while file.read_line(&mut line)? > 0 {
            let state: State = serde_json::from_str(&line).context("a connection is not understood by this version")?;
            let mut bytes = Vec::new();
            (&mut file).take(state.bytes() as u64).read_to_end(&mut bytes)?;
            ensure!(bytes.len() == state.bytes(), "the state ends in the middle of a connection");
            states.push((state, bytes));
            line.clear();
        }
        let wanted = offer.sockets.len() + states.iter().map(|(state, _)| state.descriptors()).sum::<usize>();
        let descriptors = dequeue(&self.queues)?;
        ensure!(descriptors.len() == wanted, "it has {} descriptors, not {wanted}", descriptors.len());
        let mut descriptors = descriptors.into_iter();
        let sockets = offer.sockets.iter().cloned().zip(descriptors.by_ref()).collect();
        let parcel = |(state, bytes): (State, Vec<u8>)| {
            let descriptors = descriptors.by_ref().take(state.descriptors()).collect();
            Parcel { state, descriptors, bytes }
        };
        let parcels = states.into_iter().map(parcel).collect();
        Ok(Contents { offer, sockets, parcels })
    }

    /// For whoever keeps or sends it.
    pub fn descriptors(&self) -> Vec<BorrowedFd<'_>> {
        [self.state.as_fd()].into_iter().chain(self.queues.iter().map(AsFd::as_fd)).collect()
    }

    /// From what [`descriptors`](Self::descriptors) gave, in any order.
    pub fn from_descriptors(descriptors: Vec<OwnedFd>) -> Result<Self> {
        let is_file = |descriptor: &OwnedFd| {
            fstat(descriptor).is_ok_and(|stat| FileType::from_raw_mode(stat.st_mode) == FileType::RegularFile)
        };
        let (files, queues): (Vec<_>, Vec<_>) = descriptors.into_iter().partition(is_file);
        ensure!(queues.len() <= MOST_QUEUES, "a package has no {} queues", queues.len());
        let Ok([state]) = <[OwnedFd; 1]>::try_from(files) else { bail!("a package has one file") };
        Ok(Self { state: state.into(), queues })
    }
}

/// Puts copies into as few queues as they go into.
fn enqueue(descriptors: &[BorrowedFd<'_>]) -> io::Result<Vec<OwnedFd>> {
    let mut queues = Vec::new();
    let mut messages = descriptors.chunks(IN_A_MESSAGE).peekable();
    while messages.peek().is_some() {
        let (to, queue) = descriptors::pair()?;
        let number = [u8::try_from(queues.len()).map_err(io::Error::other)?];
        let mut is_empty = true;
        while let Some(message) = messages.peek() {
            match descriptors::send(&to, &number, message, SendFlags::DONTWAIT) {
                Ok(()) => drop(messages.next()),
                // It is full.
                Err(error) if error.kind() == io::ErrorKind::WouldBlock && !is_empty => break,
                Err(error) => return Err(error),
            }
            is_empty = false;
        }
        queues.push(queue);
    }
    Ok(queues)
}

/// Takes all out, in their order.
fn dequeue(queues: &[OwnedFd]) -> io::Result<Vec<OwnedFd>> {
    let mut all = Vec::new();
    for queue in queues {
        let mut number = [0];
        let mut of_queue = Vec::new();
        while let Some((_, descriptors)) = descriptors::receive(queue, &mut number, RecvFlags::DONTWAIT)? {
            of_queue.extend(descriptors);
        }
        all.push((number, of_queue));
    }
    all.sort_by_key(|(number, _)| *number);
    Ok(all.into_iter().flat_map(|(_, descriptors)| descriptors).collect())
}

#[cfg(test)]
mod tests {
    use std::net::TcpListener;

    use super::*;
    use crate::upstream::handover::UpstreamsState;

    fn offer(sockets: usize) -> Offer {
        let addr = "192.0.2.1:443".parse().unwrap();
        Offer::new(7, vec![Listening::Public(addr); sockets], UpstreamsState::default())
    }

    #[test]
    fn descriptors_come_out_in_their_order_however_many_there_are() {
        let listeners: Vec<_> = (0..2000).map(|_| TcpListener::bind("127.0.0.1:0").unwrap()).collect();
        let copies: Vec<_> = listeners.iter().map(AsFd::as_fd).collect();
        let package = Package::pack(&offer(copies.len()), &copies, &[]).unwrap();
        assert_eq!(package.offer().unwrap(), package.offer().unwrap(), "it can be read again");
        let sent: Vec<OwnedFd> = package.descriptors().iter().rev().map(|d| d.try_clone_to_owned().unwrap()).collect();
        drop(package);
        let Contents { offer: got, sockets, parcels } = Package::from_descriptors(sent).unwrap().unpack().unwrap();
        assert_eq!((got.generation, parcels.len()), (7, 0));
        let got: Vec<_> = sockets.into_iter().map(|(_, d)| TcpListener::from(d).local_addr().unwrap()).collect();
        assert_eq!(got, listeners.iter().map(|l| l.local_addr().unwrap()).collect::<Vec<_>>());
    }

    #[test]
    fn what_is_not_understood_is_refused_by_name() {
        let written = |text: &str| {
            let mut state = File::from(memfd_create("test", MemfdFlags::CLOEXEC).unwrap());
            state.write_all(text.as_bytes()).unwrap();
            let (_, queue) = descriptors::pair().unwrap();
            format!("{:#}", Package { state, queues: vec![queue] }.unpack().unwrap_err())
        };
        assert!(written("").contains("empty"));
        let good = serde_json::to_string(&offer(0)).unwrap();
        let later = written(&good.replacen("\"format\":1", "\"format\":2", 1));
        assert!(later.contains("format 2") && later.contains("knows format 1"), "{later}");
        let wider = written(&good.replacen('{', "{\"colour\":1,", 1));
        assert!(wider.contains("colour"), "{wider}");
        let connection = written(&format!("{good}\n{{\"sleeping\":{{}}}}"));
        assert!(connection.contains("sleeping"), "{connection}");
        let missing = written(&serde_json::to_string(&offer(1)).unwrap());
        assert!(missing.contains("0 descriptors, not 1"), "{missing}");
    }
}
