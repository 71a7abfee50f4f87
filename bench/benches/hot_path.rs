//! What every connection passes before an engine takes over: hello, route, PROXY header.

use std::hint::black_box;
use std::sync::Arc;

use criterion::{Criterion, criterion_group, criterion_main};
use dataplane::config::{Source, parse};
use dataplane::hello::{Input, Machine, Progress};
use dataplane::proxy_protocol::{Header, MAX_ENCODED, encode_v2};
use dataplane::route::Table;

fn hello(c: &mut Criterion) {
    let captures: [(&str, &[u8]); 2] = [
        ("openssl", include_bytes!("../../dataplane/testdata/hello/openssl.bin")),
        ("chrome131 (ML-KEM)", include_bytes!("../../dataplane/testdata/hello/chrome131.bin")),
    ];
    for (name, capture) in captures {
        c.bench_function(&format!("hello {name}"), |b| {
            b.iter(|| {
                let mut machine = Machine::new(16384);
                assert!(matches!(machine.input(Input::Bytes(black_box(capture))), Progress::Hello(_)));
            });
        });
    }
}

fn route(c: &mut Criterion) {
    let hosts: Vec<String> = (0..10_000).map(|i| format!("\"host-{i}.example.com\"")).collect();
    let text = format!(
        "listeners.public.bind = [\"127.0.0.1:443\"]\nupstreams.u.targets = [\"192.0.2.1:443\"]\n\
         [[routes]]\nhosts = [{}]\nupstream = \"u\"\n[[routes]]\nhosts = [\"*.apps.example.com\"]\nupstream = \"u\"\n",
        hosts.join(",")
    );
    let source = Source::new("bench.toml", text);
    let (config, _) = parse(Arc::new(source)).expect("it is valid");
    let table = Table::new(&config);
    for name in ["host-9999.example.com", "a.b.apps.example.com", "unlisted.example.org"] {
        c.bench_function(&format!("route of 10,000 hosts: {name}"), |b| {
            b.iter(|| table.find(0, Some(black_box(name)), std::iter::empty()));
        });
    }
}

fn proxy_header(c: &mut Criterion) {
    let header = Header {
        client: "192.0.2.7:51234".parse().expect("an address"),
        server: "198.51.100.1:443".parse().expect("an address"),
        authority: Some("blog.example.com"),
        alpn: Some(b"h2"),
        unique_id: &[7; 16],
    };
    let mut out = Vec::with_capacity(MAX_ENCODED);
    c.bench_function("PROXY v2 header", |b| {
        b.iter(|| {
            out.clear();
            encode_v2(&mut out, black_box(&header));
        });
    });
}

criterion_group!(benches, hello, route, proxy_header);
criterion_main!(benches);
