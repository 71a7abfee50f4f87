//! Whatever a trusted peer sends: no panic, one answer however the bytes are cut, and what was read
//! can be written and read again.
#![no_main]

use dataplane::proxy_protocol::{Decoded, Header, MAX_HEADER, decode, encode_v1, encode_v2};
use libfuzzer_sys::fuzz_target;

fuzz_target!(|data: &[u8]| {
    let whole = decode(data);
    let mut answer = Decoded::NeedMore;
    for end in 0..=data.len().min(MAX_HEADER + 1) {
        answer = decode(&data[..end]);
        if answer != Decoded::NeedMore {
            break;
        }
    }
    assert_eq!(answer, whole);

    let Decoded::Header { len, source } = whole else { return };
    assert_eq!(decode(&data[..len]), whole);
    let Some(source) = source else { return };

    let mut v1 = Vec::new();
    encode_v1(&mut v1, source.client, source.server);
    let Decoded::Header { len, source: Some(again) } = decode(&v1) else { panic!("{}", v1.escape_ascii()) };
    assert_eq!((len, again.client, again.server), (v1.len(), source.client, source.server));

    let mut v2 = Vec::new();
    let unique_id = source.unique_id.unwrap_or_default();
    encode_v2(&mut v2, &Header { client: source.client, server: source.server, authority: None, alpn: None, unique_id });
    let Decoded::Header { len, source: Some(again) } = decode(&v2) else { panic!("{}", v2.escape_ascii()) };
    assert_eq!((len, again.client, again.server), (v2.len(), source.client, source.server));
    assert_eq!(again.unique_id.unwrap_or_default(), unique_id);
});
