//! What predecessor and successor say to each other during an upgrade.
//!
//! | predecessor | | successor |
//! | --- | --- | --- |
//! | starts it, says what there will be | [`Message::Offer`] → | reads its configuration, tests |
//! | goes on, or stops everything | ← [`Message::Ready`] | |
//! | | [`Message::Package`] → | understands all of it, and does nothing yet |
//! | | ← [`Message::Taken`] | |
//! | from here on nothing is its own | [`Message::Go`] → | goes on with everything |
//! | tells systemd who is in charge | ← [`Message::Serving`] | |
//! | ends | [`Message::Bye`] → | tells systemd that it is ready |
//!
//! Up to `Go` either of them can fail, and the predecessor goes on with everything.

use std::io;
use std::os::fd::OwnedFd;
use std::time::Duration;

use anyhow::{Context, Result, bail};
use rustix::net::{RecvFlags, SendFlags, sockopt};
use serde::{Deserialize, Serialize};

use super::{Package, Report};
use crate::kernel::descriptors;

/// The longest message, bytes: the reason of a failure is cut to fit.
const LONGEST: usize = 16 << 10;

/// One end of the conversation.
#[derive(Debug)]
pub struct Channel(OwnedFd);

/// See the module's description.
#[derive(Debug, Serialize, Deserialize)]
#[serde(rename_all = "snake_case", deny_unknown_fields)]
pub enum Message {
    /// With a package that has neither sockets nor connections.
    Offer,
    /// The successor runs as this process; said by whoever has started it.
    Launched(i32),
    Ready,
    /// With the package.
    Package,
    Taken,
    Go,
    Serving(Report),
    Bye,
    /// The successor gives up.
    Failed(String),
}

impl Channel {
    /// Both ends: ours, and that of the process to be started.
    pub fn pair() -> io::Result<(Self, OwnedFd)> {
        let (near, far) = descriptors::pair()?;
        Ok((Self(near), far))
    }

    pub fn new(descriptor: OwnedFd) -> Self {
        Self(descriptor)
    }

    pub fn send(&self, message: &Message) -> Result<()> {
        self.send_with(message, None)
    }

    pub fn send_with(&self, message: &Message, package: Option<&Package>) -> Result<()> {
        let descriptors = package.map(Package::descriptors).unwrap_or_default();
        let bytes = serde_json::to_vec(message)?;
        descriptors::send(&self.0, &bytes, &descriptors, SendFlags::empty()).context("it has ended")
    }

    /// Gives up, with the reason.
    pub fn fail(&self, reason: &str) {
        let mut end = reason.len().min(LONGEST / 8);
        while !reason.is_char_boundary(end) {
            end -= 1;
        }
        let _ = self.send(&Message::Failed(reason[..end].to_owned()));
    }

    /// Waits for what the other end says next.
    ///
    /// # Errors
    /// It has ended, or given up, or says nothing for so long.
    pub fn receive(&self, patience: Duration) -> Result<(Message, Vec<OwnedFd>)> {
        sockopt::set_socket_timeout(&self.0, sockopt::Timeout::Recv, Some(patience))?;
        let mut buffer = vec![0; LONGEST];
        let received = match descriptors::receive(&self.0, &mut buffer, RecvFlags::empty()) {
            Ok(received) => received,
            Err(error) if error.kind() == io::ErrorKind::WouldBlock => {
                bail!("it says nothing for {} s", patience.as_secs())
            }
            // So it is where it has not read all that it was told.
            Err(error) if error.kind() == io::ErrorKind::ConnectionReset => None,
            Err(error) => return Err(error).context("the channel between both processes"),
        };
        let Some((length, descriptors)) = received else { bail!("it has ended") };
        match serde_json::from_slice(&buffer[..length]).context("it says something that is not understood")? {
            Message::Failed(reason) => bail!("{reason}"),
            message => Ok((message, descriptors)),
        }
    }
}
