//! Where the members of the running kernel's structures are (kernel: Documentation/bpf/btf.rst).
//!
//! Of the libraries that read BTF one is under the LGPL, one keeps members to itself, and one
//! unfolds all 150,000 types into tens of megabytes, which the machines that this runs on do not
//! have to spare. All that is needed here is one pass over the file.

use std::path::Path;
use std::{fs, io};

/// The type information of the running kernel.
pub const KERNEL: &str = "/sys/kernel/btf/vmlinux";

const MAGIC: u16 = 0xeb9f;
const KIND_STRUCT: u32 = 4;

/// Byte offsets of members, asked for as `("tcp_sock", "write_seq")`, in the order of the
/// questions.
///
/// # Errors
/// `InvalidData` when the file is not BTF of this machine's byte order, `NotFound` when it has no
/// such structure or member.
pub fn offsets<const N: usize>(file: &Path, members: [(&str, &str); N]) -> io::Result<[u32; N]> {
    find(&fs::read(file)?, members)
}

fn find<const N: usize>(data: &[u8], members: [(&str, &str); N]) -> io::Result<[u32; N]> {
    let mut found = [None; N];
    let broken = || io::Error::new(io::ErrorKind::InvalidData, "not BTF of this machine, or cut off");
    let (types, strings) = sections(data).ok_or_else(broken)?;
    let mut rest = types;
    while !rest.is_empty() {
        let (one, after) = Type::parse(rest).ok_or_else(broken)?;
        rest = after;
        if one.kind != KIND_STRUCT {
            continue;
        }
        let name = string(strings, one.name).ok_or_else(broken)?;
        for (offset, (structure, member)) in found.iter_mut().zip(members) {
            if offset.is_none() && name == structure.as_bytes() {
                *offset = one.member(strings, member);
            }
        }
    }
    for (offset, (structure, member)) in found.iter().zip(members) {
        if offset.is_none() {
            let message = format!("this kernel has no member {member} at a whole byte of struct {structure}");
            return Err(io::Error::new(io::ErrorKind::NotFound, message));
        }
    }
    Ok(found.map(|offset| offset.expect("looked at just now")))
}

fn word(data: &[u8], at: usize) -> Option<u32> {
    Some(u32::from_ne_bytes(data.get(at..at + 4)?.try_into().expect("four bytes")))
}

/// Types and strings of a file (struct btf_header, include/uapi/linux/btf.h).
fn sections(data: &[u8]) -> Option<(&[u8], &[u8])> {
    if data.get(..2)? != MAGIC.to_ne_bytes() {
        return None;
    }
    let header = word(data, 4)? as usize;
    let section = |at: usize| {
        let start = header.checked_add(word(data, at)? as usize)?;
        data.get(start..start.checked_add(word(data, at + 4)? as usize)?)
    };
    Some((section(8)?, section(16)?))
}

fn string(strings: &[u8], at: u32) -> Option<&[u8]> {
    strings.get(at as usize..)?.split(|byte| *byte == 0).next()
}

struct Type<'a> {
    name: u32,
    kind: u32,
    /// Offsets hold the width of bit fields, too.
    with_widths: bool,
    extra: &'a [u8],
}

impl<'a> Type<'a> {
    /// The first type, and what is behind it (struct btf_type).
    fn parse(data: &'a [u8]) -> Option<(Self, &'a [u8])> {
        let (name, info) = (word(data, 0)?, word(data, 4)?);
        let count = (info & 0xffff) as usize;
        let kind = info >> 24 & 0x1f;
        let extra = match kind {
            // Integers, variables, tags of declarations
            1 | 14 | 17 => 4,
            // Arrays
            3 => 12,
            // Structures, unions, sections, enumerations of 64 bits
            KIND_STRUCT | 5 | 15 | 19 => 12 * count,
            // Enumerations, prototypes
            6 | 13 => 8 * count,
            2 | 7..=12 | 16 | 18 => 0,
            _ => return None,
        };
        let end = 12 + extra;
        Some((Self { name, kind, with_widths: info >> 31 == 1, extra: data.get(12..end)? }, &data[end..]))
    }

    fn member(&self, strings: &[u8], name: &str) -> Option<u32> {
        let member = self
            .extra
            .chunks_exact(12)
            .find(|m| word(m, 0).and_then(|at| string(strings, at)) == Some(name.as_bytes()))?;
        let offset = word(member, 8)?;
        let bits = if self.with_widths { offset & 0xff_ffff } else { offset };
        (bits % 8 == 0).then_some(bits / 8)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    /// `struct b { int x; char y; }` after a type of each length.
    fn sample() -> Vec<u8> {
        let strings = b"\0b\0x\0y\0";
        let mut types = Vec::new();
        let mut push = |words: &[u32]| types.extend(words.iter().flat_map(|w| w.to_ne_bytes()));
        push(&[0, 1 << 24, 4, 32]);
        push(&[0, 3 << 24, 0, 1, 1, 4]);
        push(&[0, 6 << 24 | 2, 4, 3, 0, 5, 1]);
        push(&[1, 4 << 24 | 2, 8, 3, 1, 0, 5, 1, 32]);
        let mut file = Vec::new();
        file.extend(MAGIC.to_ne_bytes());
        file.extend([1, 0]);
        for word in [24, 0, types.len() as u32, types.len() as u32, strings.len() as u32] {
            file.extend(word.to_ne_bytes());
        }
        file.extend(types);
        file.extend(strings);
        file
    }

    #[test]
    fn a_member_is_found_behind_types_of_other_kinds() {
        assert_eq!(find(&sample(), [("b", "y"), ("b", "x")]).unwrap(), [4, 0]);
    }

    #[test]
    fn a_member_that_is_missing_is_named() {
        let error = find(&sample(), [("b", "x"), ("b", "z")]).unwrap_err();
        assert!(error.to_string().contains("member z") && error.to_string().contains("struct b"), "{error}");
    }

    #[test]
    fn no_prefix_and_no_other_kind_of_file_is_taken_for_btf() {
        let file = sample();
        for end in 0..file.len() {
            assert!(find(&file[..end], [("b", "y")]).is_err(), "{end}");
        }
        assert!(find(b"\x7fELF\0\0\0\0\0\0\0\0\0\0\0\0\0\0\0\0\0\0\0\0\0", [("b", "y")]).is_err());
    }

    #[test]
    fn the_running_kernel_tells_where_write_seq_is() {
        let [write_seq, sndbuf] =
            offsets(Path::new(KERNEL), [("tcp_sock", "write_seq"), ("sock", "sk_sndbuf")]).unwrap();
        assert!(write_seq > sndbuf && sndbuf > 0);
    }
}
