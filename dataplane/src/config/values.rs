//! Durations, sizes, bind addresses and networks as people write them. Errors say what to write
//! instead.

use std::net::{IpAddr, Ipv4Addr, Ipv6Addr, SocketAddr};
use std::time::Duration;

use ipnet::{IpNet, ipv4_mask_to_prefix};

/// Why a value is refused, and what to write instead.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Refused {
    /// What is wrong: `` `10` has no unit ``.
    pub message: String,
    /// The remedy: `` write "10s" ``.
    pub remedy: String,
}

pub(super) fn refuse<T>(message: impl Into<String>, remedy: impl Into<String>) -> Result<T, Refused> {
    Err(Refused { message: message.into(), remedy: remedy.into() })
}

const DURATION_UNITS: [(&str, u64); 4] = [("h", 3_600_000), ("m", 60_000), ("s", 1000), ("ms", 1)];

/// `"1h30m"`, `"250ms"`, `"0s"`: whole numbers with units, the largest first, each at most once.
pub fn parse_duration(text: &str) -> Result<Duration, Refused> {
    const EXAMPLES: &str = "write a duration such as \"250ms\", \"5s\", \"1m\" or \"1h30m\"";
    let compact: String = text.split_whitespace().collect();
    if compact != text && !compact.is_empty() {
        let remedy = parse_duration(&compact).map_or_else(|refused| refused.remedy, |_| format!("write \"{compact}\""));
        return refuse(format!("`{text}` has spaces in it"), remedy);
    }
    let mut rest = text;
    let mut millis: u64 = 0;
    let mut last_unit = u64::MAX;
    while !rest.is_empty() {
        let (digits, tail) = split_digits(rest);
        let (unit, tail) = tail.split_at(tail.find(|c: char| !c.is_ascii_alphabetic()).unwrap_or(tail.len()));
        if digits.is_empty() {
            return refuse(format!("`{text}` is not a duration"), EXAMPLES);
        }
        if unit.is_empty() && tail.is_empty() {
            return refuse(
                format!("`{text}` has no unit"),
                format!("write \"{text}s\" for seconds; units are h, m, s, ms"),
            );
        }
        let Some(&(_, factor)) = DURATION_UNITS.iter().find(|(name, _)| *name == unit) else {
            return refuse(format!("`{text}` is not a duration"), unit_hint(digits, unit).unwrap_or(EXAMPLES.into()));
        };
        if factor >= last_unit {
            return refuse(
                format!("the units of `{text}` are not in order"),
                "write the largest unit first, each once: \"1h30m\"",
            );
        }
        last_unit = factor;
        let part = digits.parse::<u64>().ok().and_then(|n| n.checked_mul(factor));
        let Some(sum) = part.and_then(|part| millis.checked_add(part)) else {
            return refuse(format!("`{text}` is too long a time"), EXAMPLES);
        };
        millis = sum;
        rest = tail;
    }
    if text.is_empty() {
        return refuse("the duration is empty", EXAMPLES);
    }
    Ok(Duration::from_millis(millis))
}

fn unit_hint(digits: &str, unit: &str) -> Option<String> {
    let known = match unit.to_ascii_lowercase().as_str() {
        "h" | "hr" | "hrs" | "hour" | "hours" => "h",
        "m" | "min" | "mins" | "minute" | "minutes" => "m",
        "s" | "sec" | "secs" | "second" | "seconds" => "s",
        "ms" | "msec" | "millis" | "milliseconds" => "ms",
        "d" | "day" | "days" => return Some("the largest unit is h: a day is \"24h\"".into()),
        _ => return None,
    };
    Some(format!("write \"{digits}{known}\""))
}

/// The shortest text that the configuration reads as `duration`, to the millisecond.
pub fn format_duration(duration: Duration) -> String {
    let mut millis = duration.as_millis();
    let mut text = String::new();
    for (unit, factor) in DURATION_UNITS {
        let count = millis / u128::from(factor);
        if count > 0 {
            text += &count.to_string();
            text += unit;
        }
        millis %= u128::from(factor);
    }
    if text.is_empty() { "0s".into() } else { text }
}

const SIZE_UNITS: [(&str, u64); 7] = [
    ("GiB", 1 << 30),
    ("MiB", 1 << 20),
    ("KiB", 1 << 10),
    ("GB", 1_000_000_000),
    ("MB", 1_000_000),
    ("KB", 1000),
    ("B", 1),
];

/// `"64MiB"`, `"10MB"`, `"512B"`, `"16384"`.
pub fn parse_size(text: &str) -> Result<u64, Refused> {
    const EXAMPLES: &str =
        "write a size such as \"64KiB\", \"64MiB\", \"1GiB\" or \"10MB\", or bytes as a plain number";
    let (digits, unit) = split_digits(text);
    if digits.is_empty() {
        return refuse(format!("`{text}` is not a size"), EXAMPLES);
    }
    let factor = match SIZE_UNITS.iter().find(|(name, _)| *name == unit) {
        Some(&(_, factor)) => factor,
        None if unit.is_empty() => 1,
        None => {
            let wanted = unit.trim().to_ascii_lowercase();
            let known = SIZE_UNITS.iter().find(|(name, _)| {
                // `M` is mostly meant as in nginx and systemd: binary.
                let name = name.to_ascii_lowercase();
                name == wanted || name.strip_suffix("ib").is_some_and(|name| name == wanted)
            });
            let remedy = known.map_or(EXAMPLES.to_owned(), |(name, _)| format!("write \"{digits}{name}\""));
            return refuse(format!("`{text}` is not a size"), remedy);
        }
    };
    match digits.parse::<u64>().ok().and_then(|n| n.checked_mul(factor)) {
        Some(bytes) => Ok(bytes),
        None => refuse(format!("`{text}` is too large"), EXAMPLES),
    }
}

/// The shortest text that the configuration reads as `bytes`, in binary units.
pub fn format_size(bytes: u64) -> String {
    let unit = SIZE_UNITS[..3].iter().find(|(_, factor)| bytes >= *factor && bytes.is_multiple_of(*factor));
    unit.map_or_else(|| bytes.to_string(), |(name, factor)| format!("{}{name}", bytes / factor))
}

fn split_digits(text: &str) -> (&str, &str) {
    text.split_at(text.find(|c: char| !c.is_ascii_digit()).unwrap_or(text.len()))
}

/// `"0.0.0.0:443"`, `"[::]:443"`: an address of this machine with a port.
pub fn parse_bind(text: &str) -> Result<SocketAddr, Refused> {
    const EXAMPLES: &str = "write an address and a port, such as \"0.0.0.0:443\" or \"[::]:443\"";
    if has_zone(text) {
        return Err(link_local(text));
    }
    if let Ok(addr) = text.parse::<SocketAddr>() {
        if addr.port() == 0 {
            return refuse(format!("`{text}` has port 0"), "write a port from 1 to 65535");
        }
        if let IpAddr::V6(ip) = addr.ip()
            && ip.is_unicast_link_local()
        {
            return Err(link_local(text));
        }
        if is_of_many(addr.ip()) {
            return refuse(
                format!("`{text}` is a multicast or broadcast address: TCP has no connections to these"),
                format!("write an address of this machine, or \"{}\" for all of them", any_beside(addr)),
            );
        }
        if let IpAddr::V6(ip) = addr.ip()
            && let Some(v4) = ip.to_ipv4_mapped()
        {
            return refuse(
                format!("`{text}` is an IPv4 address written as IPv6, and IPv6 sockets here are IPv6 only"),
                format!("write \"{v4}:{}\"", addr.port()),
            );
        }
        return Ok(addr);
    }
    if let Some(socket) = text.strip_prefix("unix:") {
        return refuse(format!("`{socket}` is a unix socket, and clients come by TCP"), EXAMPLES);
    }
    if let Some(("", port)) = text.strip_prefix(':').and_then(|text| text.split_once(':'))
        && let Ok(port) = port.parse::<u16>()
    {
        return refuse(format!("the IPv6 address of `{text}` has no brackets"), format!("write \"[::]:{port}\""));
    }
    if let Ok(ip) = text.parse::<IpAddr>() {
        return refuse(format!("`{text}` has no port"), format!("write \"{}\"", SocketAddr::new(ip, 443)));
    }
    if let Some(ip) = text.strip_prefix('[').and_then(|t| t.strip_suffix(']')).and_then(|t| t.parse::<Ipv6Addr>().ok())
    {
        return refuse(format!("`{text}` has no port"), format!("write \"[{ip}]:443\""));
    }
    let (host, port) = text.rsplit_once(':').unwrap_or(("", text));
    let Ok(port) = port.parse::<u16>() else {
        return if !port.is_empty() && port.bytes().all(|b| b.is_ascii_digit()) {
            refuse(format!("`{port}` is not a port"), "write a port from 1 to 65535")
        } else {
            refuse(format!("`{text}` is not an address to listen on"), EXAMPLES)
        };
    };
    match host {
        "" | "*" => refuse(
            format!("`{text}` does not say which address to listen on"),
            format!("write \"0.0.0.0:{port}\" for IPv4 and \"[::]:{port}\" for IPv6, both for both"),
        ),
        "localhost" => refuse(
            "a listener needs an address, not a name",
            format!("write \"127.0.0.1:{port}\", \"[::1]:{port}\" or both"),
        ),
        host if host.contains(':') && !host.starts_with('[') && host.parse::<Ipv6Addr>().is_ok() => {
            refuse(format!("the IPv6 address of `{text}` has no brackets"), format!("write \"[{host}]:{port}\""))
        }
        _ => refuse(format!("`{text}` is not an address to listen on"), EXAMPLES),
    }
}

/// What the configuration calls a value.
pub fn word<T: PartialEq>(value: &T, words: &[(&'static str, T)]) -> &'static str {
    words.iter().find(|(_, other)| other == value).map_or("", |(word, _)| word)
}

/// Quotation marks, plain and typographic: a text that was copied from a web page may have them.
pub fn is_quotation_mark(c: char) -> bool {
    matches!(c, '"' | '\'' | '`' | '´' | '«' | '»' | '‹' | '›' | '\u{2018}'..='\u{201f}' | '\u{ff02}' | '\u{ff07}')
}

/// Whether an address stands for many machines at once.
pub fn is_of_many(ip: IpAddr) -> bool {
    ip.is_multicast() || ip == Ipv4Addr::BROADCAST
}

/// Every address of the same family, with the same port.
fn any_beside(addr: SocketAddr) -> SocketAddr {
    let any: IpAddr = if addr.is_ipv4() { Ipv4Addr::UNSPECIFIED.into() } else { Ipv6Addr::UNSPECIFIED.into() };
    SocketAddr::new(any, addr.port())
}

/// Link-local addresses mean nothing without an interface, and interfaces cannot be written here.
pub fn link_local(text: &str) -> Refused {
    Refused {
        message: format!("`{text}` is a link-local address: it belongs to one interface, and none can be named here"),
        remedy: "write an address that holds on every interface: a global one, or one of fd00::/8".into(),
    }
}

/// Whether a text has a zone: `[fe80::1%eth0]:443` (RFC 4007 section 11).
pub fn has_zone(text: &str) -> bool {
    text.split_once('%').is_some_and(|(ip, _)| ip.trim_start_matches('[').parse::<Ipv6Addr>().is_ok())
}

/// `"10.0.0.0/8"`, `"fd00::/8"`, `"192.0.2.7"`. What is IPv4 written as IPv6
/// (`::ffff:10.0.0.0/104`) is read as IPv4.
pub fn parse_net(text: &str) -> Result<IpNet, Refused> {
    const EXAMPLES: &str = "write a network such as \"10.0.0.0/8\" or \"fd7a:115c:a1e0::/48\", or a single address";
    if let Ok(ip) = text.parse::<IpAddr>() {
        return Ok(ip.to_canonical().into());
    }
    let Some((ip, prefix)) = text.split_once('/') else {
        return refuse(format!("`{text}` is not a network"), EXAMPLES);
    };
    let Ok(ip) = ip.parse::<IpAddr>() else {
        return refuse(format!("`{ip}` is not an IP address"), EXAMPLES);
    };
    if ip.is_ipv4()
        && let Ok(mask) = prefix.parse::<Ipv4Addr>()
        && let Ok(prefix) = ipv4_mask_to_prefix(mask)
    {
        return refuse(format!("`{text}` gives a network mask"), format!("write \"{ip}/{prefix}\""));
    }
    let longest = if ip.is_ipv4() { 32 } else { 128 };
    let Some(net) = prefix.parse::<u8>().ok().and_then(|prefix| IpNet::new(ip, prefix).ok()) else {
        return refuse(
            format!("`/{prefix}` is not a prefix length"),
            format!("write a number of bits from 0 to {longest} after the slash"),
        );
    };
    if net.trunc() != net {
        return refuse(
            format!("`{text}` is not a network: bits after the first {} are set", net.prefix_len()),
            format!("write \"{}\" for the network, or \"{ip}\" for this address alone", net.trunc()),
        );
    }
    // Clients are compared by their IPv4 address, however it is written: so it is here.
    if let IpNet::V6(v6) = net
        && let (Some(v4), Some(prefix)) = (v6.addr().to_ipv4_mapped(), v6.prefix_len().checked_sub(96))
        && let Ok(v4) = IpNet::new(v4.into(), prefix)
    {
        return Ok(v4);
    }
    Ok(net)
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    #[test]
    fn a_network_of_ipv4_addresses_is_one_however_it_is_written() {
        for (written, meant) in [
            ("::ffff:203.0.113.0/120", "203.0.113.0/24"),
            ("::ffff:0:0/96", "0.0.0.0/0"),
            ("::ffff:203.0.113.7", "203.0.113.7/32"),
            ("::ffff:203.0.113.7/128", "203.0.113.7/32"),
            ("2001:db8::/32", "2001:db8::/32"),
            ("::/0", "::/0"),
        ] {
            assert_eq!(parse_net(written).map(|net| net.to_string()), Ok(meant.to_owned()), "{written}");
        }
        assert!(parse_net("::ffff:0:0/90").is_err(), "no IPv4 network is that wide");
    }

    #[test]
    fn durations_are_read_as_written() {
        let millis = |text| parse_duration(text).unwrap().as_millis();
        assert_eq!(millis("0s"), 0);
        assert_eq!(millis("250ms"), 250);
        assert_eq!(millis("5s"), 5000);
        assert_eq!(millis("1m"), 60_000);
        assert_eq!(millis("1h30m"), 5_400_000);
        assert_eq!(millis("1h0m1s5ms"), 3_601_005);
    }

    #[test]
    fn durations_that_could_mean_two_things_are_refused() {
        for text in
            ["", "5", "s", "-5s", "1.5s", "5 s", " 5s", "5S", "30m1h", "1s1s", "5sec", "1d", "99999999999999999999h"]
        {
            assert!(parse_duration(text).is_err(), "{text}");
        }
        assert_eq!(parse_duration("5").unwrap_err().remedy, "write \"5s\" for seconds; units are h, m, s, ms");
        assert_eq!(parse_duration("5min").unwrap_err().remedy, "write \"5m\"");
    }

    #[test]
    fn sizes_are_read_as_written() {
        assert_eq!(parse_size("16384"), Ok(16384));
        assert_eq!(parse_size("64KiB"), Ok(64 << 10));
        assert_eq!(parse_size("1GiB"), Ok(1 << 30));
        assert_eq!(parse_size("10MB"), Ok(10_000_000));
    }

    #[test]
    fn sizes_that_could_mean_two_things_are_refused() {
        for text in ["", "MiB", "64 MiB", "64mib", "64M", "-1", "1.5GiB", "99999999999GiB"] {
            assert!(parse_size(text).is_err(), "{text}");
        }
        assert_eq!(parse_size("64 mib").unwrap_err().remedy, "write \"64MiB\"");
        assert_eq!(parse_size("64M").unwrap_err().remedy, "write \"64MiB\"");
    }

    #[test]
    fn a_network_needs_its_host_bits_clear() {
        assert_eq!(parse_net("10.0.0.0/8").unwrap().to_string(), "10.0.0.0/8");
        assert_eq!(parse_net("192.0.2.7").unwrap().to_string(), "192.0.2.7/32");
        assert_eq!(parse_net("2001:db8::1").unwrap().to_string(), "2001:db8::1/128");
        assert!(parse_net("10.1.2.3/8").unwrap_err().remedy.contains("\"10.0.0.0/8\""));
        assert_eq!(parse_net("10.0.0.0/255.0.0.0").unwrap_err().remedy, "write \"10.0.0.0/8\"");
        for text in ["", "10.0.0.0/33", "10.0.0.0/", "10/8", "example.com", "::/129", "10.0.0.0/-1"] {
            assert!(parse_net(text).is_err(), "{text}");
        }
    }

    #[test]
    fn a_bind_address_needs_address_and_port() {
        assert_eq!(parse_bind("[::]:443").unwrap().to_string(), "[::]:443");
        assert_eq!(parse_bind("127.0.0.1").unwrap_err().remedy, "write \"127.0.0.1:443\"");
        assert_eq!(parse_bind("::").unwrap_err().remedy, "write \"[::]:443\"");
        assert_eq!(parse_bind("[::1]").unwrap_err().remedy, "write \"[::1]:443\"");
        assert_eq!(parse_bind("fd7a::1:2:3:4:5:6:443").unwrap_err().remedy, "write \"[fd7a::1:2:3:4:5:6]:443\"");
        assert_eq!(parse_bind("[::ffff:192.0.2.1]:443").unwrap_err().remedy, "write \"192.0.2.1:443\"");
        assert!(parse_bind(":443").unwrap_err().remedy.contains("\"0.0.0.0:443\""));
        for text in
            ["", ":", "443", "*:443", "localhost:443", "eth0:443", "0.0.0.0:0", "0.0.0.0:65536", "0.0.0.0:https"]
        {
            assert!(parse_bind(text).is_err(), "{text}");
        }
    }

    proptest! {
        #[test]
        fn a_formatted_duration_reads_back(millis in 0..u64::MAX / 2) {
            let duration = Duration::from_millis(millis);
            prop_assert_eq!(parse_duration(&format_duration(duration)), Ok(duration));
        }

        #[test]
        fn a_formatted_size_reads_back(bytes: u64) {
            prop_assert_eq!(parse_size(&format_size(bytes)), Ok(bytes));
        }

        #[test]
        fn no_text_makes_a_value_parser_panic(text in "[0-9a-zA-Z:./\\[\\] é-]{0,20}") {
            let _ = (parse_duration(&text), parse_size(&text), parse_bind(&text), parse_net(&text));
        }
    }
}
