//! What is known to be wrong with sockmaps in kernels that people run: panics, use after free,
//! deadlocks, bytes that come twice or to the wrong side.
//!
//! The self-test tries out what can be tried. These bugs need a race, or memory that is short, or
//! an skb that only a network card makes: no test at start finds them, and a client or a peer can
//! bring them about. So the kernel's own version says whether it has the fix. A kernel of which
//! that is not known counts as one without: the number of a distribution's kernel often stays at
//! `.0` whatever was mended in it.
//!
//! Only bugs that our use can reach are rows: TCP sockets, an `sk_skb` verdict that redirects to
//! egress, passes or drops; no `sk_msg` program, no strparser, no kTLS, no redirect to ingress, no
//! other protocol, no listener in the map, no helper that updates or deletes from a program. Looked
//! at and left out:
//!
//! - CVE-2022-50536, CVE-2024-56633, CVE-2024-56720, CVE-2025-39913, CVE-2026-63926,
//!   CVE-2026-64548, CVE-2026-68284, CVE-2026-74256, CVE-2026-74589: in the send path of `sk_msg`
//!   programs.
//! - CVE-2025-38166, CVE-2026-64025: kTLS on a socket of the map.
//! - CVE-2026-43016, CVE-2026-53033: `AF_UNIX`. CVE-2023-52523: redirects of `sk_msg` to other
//!   protocols than TCP.
//! - CVE-2024-35895: a program that deletes from a map while it holds an interrupt's lock.
//! - CVE-2024-56694: a verdict that passes takes a lock which its caller holds already. Only the
//!   strparser is such a caller.
//! - CVE-2024-56664: an element is replaced while its socket closes. A key of ours is used again
//!   only after its socket was closed or taken out (`table::Slot`).
//! - 76be5fae32fe (bpf, sockmap: Fix psock incorrectly pointing to sk): a socket is taken out and
//!   put back while the kernel's worker still has something to send for it. We take one out when
//!   all was sent, and put it back a second later at the earliest (`engine::promotion`).
//!
//! Sources: the records of the kernel's own CVE authority (cve/published in git.kernel.org's
//! vulns.git), and for rows without a CVE the announcements of the stable releases, which list
//! their commits. No row names a distribution's package: none was verified.

use std::fmt;

/// A release of the kernel, as kernel.org numbers them.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord)]
struct Version(u16, u16, u16);

impl fmt::Display for Version {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let Self(major, minor, patch) = self;
        match patch {
            0 => write!(f, "{major}.{minor}"),
            _ => write!(f, "{major}.{minor}.{patch}"),
        }
    }
}

impl Version {
    fn is_in_branch_of(self, other: Self) -> bool {
        (self.0, self.1) == (other.0, other.1)
    }
}

struct Bug {
    /// Continues "a bug by which …".
    what: &'static str,
    /// What to look for in a changelog: the CVE, or the commit where there is none.
    name: &'static str,
    /// The first release of mainline with the fix: it and all later branches have it.
    mainline: Version,
    /// The first release of each older branch that got it. A branch that is not here is not known
    /// to have it.
    stable: &'static [Version],
    /// Older branches that never had the bug.
    spared: &'static [Version],
}

/// Newest first: the first that a kernel is not known to be rid of is the one that is told.
const BUGS: &[Bug] = &[
    Bug {
        what: "traffic from the network can make the kernel panic",
        // 5ca2e29f6834 (bpf, sockmap: Fix panic when calling skb_linearize).
        name: "CVE-2025-38165",
        mainline: Version(6, 16, 0),
        stable: &[Version(5, 15, 190), Version(6, 1, 142), Version(6, 6, 94), Version(6, 12, 34), Version(6, 15, 3)],
        spared: &[],
    },
    Bug {
        what: "a connection that closes while the kernel forwards for it can make the kernel use memory that was freed",
        // 8259eb0e06d8 (bpf, sockmap: Avoid using sk_socket after free when sending).
        name: "CVE-2025-38154",
        mainline: Version(6, 16, 0),
        stable: &[Version(5, 15, 186), Version(6, 1, 142), Version(6, 6, 94), Version(6, 12, 34), Version(6, 15, 3)],
        spared: &[],
    },
    Bug {
        what: "bytes are sent twice to a slow reader",
        // bpf, sockmap: fix duplicated data transmission.
        name: "3b4f14b79428",
        mainline: Version(6, 16, 0),
        stable: &[Version(5, 15, 186), Version(6, 1, 142), Version(6, 6, 94), Version(6, 12, 34), Version(6, 15, 3)],
        spared: &[],
    },
    Bug {
        // What is passed and cannot be queued at once, for want of memory, is redirected at the
        // second attempt.
        what: "bytes can go back to their sender when memory is short",
        // bpf, sockmap: Fix data lost during EAGAIN retries.
        name: "7683167196bd",
        mainline: Version(6, 16, 0),
        stable: &[Version(5, 15, 186), Version(6, 1, 142), Version(6, 6, 95), Version(6, 12, 35), Version(6, 15, 4)],
        spared: &[],
    },
    Bug {
        what: "a segment without data can make the kernel follow a null pointer",
        // f0c180256937 (skmsg: Skip zero length skb in sk_msg_recvmsg).
        name: "CVE-2024-41048",
        mainline: Version(6, 10, 0),
        stable: &[Version(5, 15, 163), Version(6, 1, 100), Version(6, 6, 41), Version(6, 9, 10)],
        spared: &[],
    },
    Bug {
        what: "data that waits for a socket that leaves the map can make the kernel follow a null pointer",
        // 6648e613226e (bpf, skmsg: Fix NULL pointer dereference in sk_psock_skb_ingress_enqueue).
        name: "CVE-2024-36938",
        mainline: Version(6, 9, 0),
        stable: &[Version(5, 10, 223), Version(5, 15, 159), Version(6, 1, 91), Version(6, 6, 31), Version(6, 8, 10)],
        spared: &[],
    },
    Bug {
        what: "data that arrives for a socket that leaves the map can make the kernel follow a null pointer",
        // 4cd12c6065df (bpf, sockmap: Fix NULL pointer dereference in
        // sk_psock_verdict_data_ready()).
        name: "CVE-2024-26731",
        mainline: Version(6, 8, 0),
        stable: &[Version(6, 1, 80), Version(6, 6, 19), Version(6, 7, 7)],
        spared: &[Version(5, 15, 0)],
    },
    Bug {
        what: "the kernel's worker and a reader can free the same data",
        // a454d84ee20b (bpf, sockmap: Fix skb refcnt race after locking changes).
        name: "CVE-2023-53836",
        mainline: Version(6, 6, 0),
        stable: &[Version(5, 15, 189), Version(6, 1, 54), Version(6, 5, 4)],
        spared: &[Version(5, 10, 0)],
    },
    Bug {
        what: "a socket of the map that closes can overflow the kernel's stack",
        // 5b4a79ba65a1 (bpf, sockmap: Don't let sock_map_{close,destroy,unhash} call itself).
        name: "CVE-2023-52735",
        mainline: Version(6, 2, 0),
        stable: &[Version(5, 15, 95), Version(6, 1, 13)],
        spared: &[],
    },
    Bug {
        what: "the end of the process can make the kernel use memory that was freed",
        // 0a182f8d6074 (bpf, sockmap: fix race in sock_map_free()).
        name: "CVE-2022-50259",
        mainline: Version(6, 2, 0),
        stable: &[Version(5, 10, 163), Version(5, 15, 86), Version(6, 0, 16), Version(6, 1, 2)],
        spared: &[],
    },
];

impl Bug {
    fn is_fixed_in(&self, kernel: Kernel) -> bool {
        let version = kernel.version;
        // A candidate of the first release with the fix may be older than the fix.
        let mainline = version > self.mainline || version == self.mainline && !kernel.candidate;
        let stable = self.stable.iter().any(|fixed| version.is_in_branch_of(*fixed) && version >= *fixed);
        mainline || stable || self.spared.iter().any(|branch| version.is_in_branch_of(*branch))
    }
}

/// What the names of a running kernel say.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
struct Kernel {
    version: Version,
    /// It comes before the release of that number.
    candidate: bool,
}

impl Kernel {
    /// Of uname(2)'s fields `release` and `version`; `None` where the first is no number.
    ///
    /// Debian's release may be the name of an interface (`6.1.0-37-amd64`), and its true version
    /// stands in the other field (`#1 SMP … Debian 6.1.140-1 (2025-05-22)`).
    fn read(release: &str, version: &str) -> Option<Self> {
        let named = Self::parse(release)?;
        let mut words = version.split_whitespace();
        let package = words.find(|word| *word == "Debian").and_then(|_| words.next());
        // An epoch, as in `1:6.12.34-1+rpt1`, is of the package alone.
        let package = package.map(|package| package.split_once(':').map_or(package, |(_, upstream)| upstream));
        let packaged = package.and_then(Self::parse).filter(|it| it.version.is_in_branch_of(named.version));
        Some(packaged.unwrap_or(named))
    }

    /// Of a text that begins with `6.12.34`, `6.16` or `6.16-rc1`.
    fn parse(text: &str) -> Option<Self> {
        let end = text.find(|c: char| !c.is_ascii_digit() && c != '.').unwrap_or(text.len());
        let (numbers, rest) = text.split_at(end);
        let mut numbers = numbers.split('.');
        let mut next = || numbers.next().and_then(|number| number.parse().ok());
        let (major, minor) = (next()?, next()?);
        // `-rc1` of mainline, `~rc1` of Debian's packages, `-0.rc1` of Fedora's.
        let candidate = rest.split(['-', '~', '.', '+']).any(|part| {
            let number = part.strip_prefix("rc");
            number.is_some_and(|number| number.starts_with(|c: char| c.is_ascii_digit()))
        });
        Some(Self { version: Version(major, minor, next().unwrap_or(0)), candidate })
    }
}

/// Whether a kernel with these uname(2) fields is known to be rid of all of them.
///
/// # Errors
/// The first that it is not known to be rid of, and which versions are.
pub fn judge(release: &str, version: &str) -> Result<(), String> {
    let kernel = Kernel::read(release, version);
    let Some(bug) = BUGS.iter().find(|bug| kernel.is_none_or(|kernel| !bug.is_fixed_in(kernel))) else { return Ok(()) };
    // The number that decided, where it is not the one that everybody sees.
    let packaged = kernel.filter(|kernel| Kernel::parse(release) != Some(*kernel));
    let packaged = packaged.map_or(String::new(), |kernel| format!(" (Debian's {})", kernel.version));
    let needed: Vec<_> = needed().iter().map(Version::to_string).collect();
    Err(format!(
        "kernel {release}{packaged} is not known to have the fix of a bug by which {} ({}): needs {} or anything later in these branches, or a newer branch",
        bug.what,
        bug.name,
        needed.join(", ")
    ))
}

/// The first release without any of the bugs, of each branch that has one, oldest first; the last
/// is mainline's.
fn needed() -> Vec<Version> {
    let mut releases: Vec<_> = BUGS.iter().flat_map(|bug| bug.stable.iter().chain([&bug.mainline])).copied().collect();
    releases.sort_unstable();
    releases.retain(|version| {
        let kernel = Kernel { version: *version, candidate: false };
        BUGS.iter().all(|bug| bug.is_fixed_in(kernel))
    });
    releases.dedup_by_key(|version| (version.0, version.1));
    releases
}

#[cfg(test)]
mod tests {
    use super::*;

    fn of(release: &str) -> Result<(), String> {
        judge(release, "#1 SMP PREEMPT_DYNAMIC Tue Jun 10 12:00:00 UTC 2025")
    }

    #[test]
    fn kernels_with_all_fixes() {
        for release in [
            "5.15.190",
            "6.1.142",
            "6.1.175-android14-11",
            "6.6.95",
            "6.12.35+deb13-amd64",
            "6.12.117+deb12-cloud-amd64",
            "6.12.35+rpt-rpi-v8",
            "6.15.4-arch1-1",
            "6.15.10-200.fc42.x86_64",
            "6.16.0",
            "6.16",
            "6.16.0-1-default",
            "6.17.0-5-generic",
            "6.17.0-rc1",
            "6.18.44-fc-v657",
            "6.19-rc3",
            "7.0.11",
            "10.1.0",
        ] {
            assert_eq!(of(release), Ok(()), "{release}");
        }
    }

    #[test]
    fn kernels_that_lack_one_or_do_not_say() {
        for release in [
            // One short of the fix.
            "5.15.189",
            "6.1.141",
            "6.6.93",
            "6.12.33",
            "6.15.2-arch1-1",
            // The last of the fixes came one release later.
            "6.6.94",
            "6.12.34+deb13-amd64",
            "6.15.3",
            // Branches that ended before.
            "4.19.325",
            "5.4.302",
            "5.10.250",
            "6.8.12-10-pve",
            "6.11.11",
            "6.13.12",
            "6.14.11",
            // Distributions with numbers of their own.
            "5.15.0-156-generic",
            "6.8.0-88-generic",
            "6.8.0-1030-azure",
            "6.11.0-29-generic",
            "5.14.0-570.62.1.el9_6.x86_64",
            "6.12.0-55.9.1.el10_0.x86_64",
            "6.4.0-150600.23.65-default",
            "5.15.0-312.187.5.el9uek.x86_64",
            "6.1.0-37-cloud-amd64",
            "6.6.87.2-microsoft-standard-WSL2",
            // Before the first release with the fix.
            "6.16.0-rc1",
            "6.16-rc7",
            "6.16.0-0.rc1.17.fc43.x86_64",
            // personality(UNAME26), and what is no number.
            "2.6.78-fc-v657",
            "6",
            "six.one",
            "99999999.1.1",
            "",
        ] {
            assert!(of(release).is_err(), "{release}");
        }
    }

    #[test]
    fn debian_tells_its_version_elsewhere() {
        let at = |release: &str, package: &str| {
            judge(release, &format!("#1 SMP PREEMPT_DYNAMIC Debian {package} (2025-05-22)"))
        };
        assert_eq!(at("6.1.0-38-amd64", "6.1.147-1"), Ok(()));
        assert_eq!(at("6.1.0-56-cloud-amd64", "6.1.192-2"), Ok(()));
        assert_eq!(at("6.12.35+rpt-rpi-v8", "1:6.12.35-1+rpt1"), Ok(()));
        assert_eq!(at("6.12.35+deb12-amd64", "6.12.35-1~bpo12+1"), Ok(()));
        assert_eq!(at("6.17-amd64", "6.17~rc7-1~exp1"), Ok(()));
        for (release, package) in [
            ("6.1.0-37-amd64", "6.1.140-1"),
            ("5.10.0-35-amd64", "5.10.237-1"),
            ("6.16-amd64", "6.16~rc7-1~exp1"),
            // A number of another branch is about something else.
            ("2.6.61-37-amd64", "6.1.192-2"),
            ("6.8.0-40-generic", "6.16.3-1"),
            ("6.1.0-37-amd64", ""),
        ] {
            assert!(at(release, package).is_err(), "{release} {package}");
        }
        let why = at("6.1.0-37-amd64", "6.1.140-1").expect_err("before the fix");
        assert!(why.starts_with("kernel 6.1.0-37-amd64 (Debian's 6.1.140) is not known to have the fix"), "{why}");
    }

    #[test]
    fn what_is_missing_and_what_is_needed_are_told() {
        let why = of("6.12.20").expect_err("before the fix");
        assert!(why.contains("can make the kernel panic (CVE-2025-38165)"), "{why}");
        assert!(why.contains("needs 5.15.190, 6.1.142, 6.6.95, 6.12.35, 6.15.4, 6.16 or anything later"), "{why}");
        let why = of("6.12.34").expect_err("it lacks only the last");
        assert!(why.contains("7683167196bd"), "{why}");
    }

    #[test]
    fn the_table_is_in_order() {
        for bug in BUGS {
            assert!(bug.stable.is_sorted(), "{}", bug.name);
            assert!(bug.stable.iter().all(|fixed| *fixed < bug.mainline), "{}", bug.name);
            assert!(!bug.is_fixed_in(Kernel { version: Version(4, 20, 0), candidate: false }), "{}", bug.name);
        }
        // Its record knows of no release before the bug, and of no fix in this branch.
        let stack = BUGS.iter().find(|bug| bug.name == "CVE-2023-52735").expect("a row");
        assert!(!stack.is_fixed_in(Kernel { version: Version(5, 10, 250), candidate: false }));
        let readme = include_str!("../../../../README.md");
        for version in needed() {
            assert_eq!(of(&version.to_string()), Ok(()), "a remedy that is obeyed must do: {version}");
            assert!(readme.contains(&format!("| {version} |")), "README.md does not name {version}");
        }
    }
}
