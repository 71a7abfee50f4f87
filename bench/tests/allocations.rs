//! Hello, route and PROXY header allocate nothing on the way of a connection, once the buffers are
//! there that its bytes are kept in.

use std::alloc::{GlobalAlloc, Layout, System};
use std::cell::Cell;
use std::sync::Arc;

use dataplane::config::{Source, parse};
use dataplane::hello::{Input, Machine, Progress};
use dataplane::proxy_protocol::{Header, MAX_ENCODED, encode_v1, encode_v2};
use dataplane::route::Table;

/// Counts what each thread asks the system for.
struct Counting;

thread_local! {
    static ALLOCATIONS: Cell<usize> = const { Cell::new(0) };
}

// SAFETY: everything is passed on to the system's allocator as it came.
unsafe impl GlobalAlloc for Counting {
    unsafe fn alloc(&self, layout: Layout) -> *mut u8 {
        ALLOCATIONS.set(ALLOCATIONS.get() + 1);
        // SAFETY: the caller's promises are passed on.
        unsafe { System.alloc(layout) }
    }

    unsafe fn dealloc(&self, pointer: *mut u8, layout: Layout) {
        // SAFETY: the caller's promises are passed on.
        unsafe { System.dealloc(pointer, layout) }
    }

    unsafe fn realloc(&self, pointer: *mut u8, layout: Layout, size: usize) -> *mut u8 {
        ALLOCATIONS.set(ALLOCATIONS.get() + 1);
        // SAFETY: the caller's promises are passed on.
        unsafe { System.realloc(pointer, layout, size) }
    }
}

#[global_allocator]
static ALLOCATOR: Counting = Counting;

/// What `f` gives, and how often it allocated.
fn counted<T>(f: impl FnOnce() -> T) -> (T, usize) {
    let before = ALLOCATIONS.get();
    let value = f();
    (value, ALLOCATIONS.get() - before)
}

const HELLOS: [&[u8]; 3] = [
    include_bytes!("../../dataplane/testdata/hello/openssl-alpn.bin"),
    include_bytes!("../../dataplane/testdata/hello/chrome131.bin"),
    include_bytes!("../../dataplane/testdata/hello/firefox147.bin"),
];

/// The machine's buffer, filled as a socket would fill it.
fn put(machine: &mut Machine, bytes: &[u8]) {
    use bytes::BufMut;
    machine.buffer_mut().put_slice(bytes);
}

#[test]
fn the_counter_counts() {
    assert_eq!(counted(|| drop(std::hint::black_box(vec![1]))).1, 1);
}

#[test]
fn a_hello_costs_one_buffer_and_nothing_else() {
    for hello in HELLOS {
        let (mut machine, allocations) = counted(|| {
            let mut machine = Machine::new(16384);
            put(&mut machine, &hello[..1000.min(hello.len())]);
            machine
        });
        assert_eq!(allocations, 1, "the buffer that keeps the bytes for the upstream");
        let ((), allocations) = counted(|| {
            machine.input(Input::Bytes(&[]));
            put(&mut machine, &hello[1000.min(hello.len())..]);
            let Progress::Hello(hello) = machine.input(Input::Bytes(&[])) else { panic!("the hello is whole") };
            assert!(hello.server_name.is_some() && hello.alpn.count() > 0);
        });
        assert_eq!(allocations, 0);
    }
}

#[test]
fn a_lookup_among_ten_thousand_hosts_allocates_nothing() {
    let hosts: Vec<String> = (0..10_000).map(|i| format!("\"host-{i}.example.com\"")).collect();
    let text = format!(
        "listeners.public.bind = [\"127.0.0.1:443\"]\nupstreams.u.targets = [\"192.0.2.1:443\"]\n\
         [[routes]]\nhosts = [{}]\nupstream = \"u\"\n\
         [[routes]]\nhosts = [\"*.apps.example.com\"]\nalpn = [\"h2\"]\nupstream = \"u\"\n",
        hosts.join(",")
    );
    let (config, _) = parse(Arc::new(Source::new("bench.toml", text))).expect("it is valid");
    let table = Table::new(&config);
    let cases = [("host-9999.example.com", true), ("a.b.apps.example.com", true), ("unlisted.example.org", false)];
    for (name, listed) in cases {
        let (found, allocations) = counted(|| table.find(0, Some(name), [&b"h2"[..]].into_iter()).is_ok());
        assert_eq!((found, allocations), (listed, 0), "{name}");
    }
}

#[test]
fn a_proxy_header_fits_the_buffer_that_was_made_for_it() {
    for address in ["192.0.2.7:51234", "[2001:db8::7]:51234"] {
        let client = address.parse().expect("an address");
        let header = Header {
            client,
            server: "198.51.100.1:443".parse().expect("an address"),
            authority: Some("blog.example.com"),
            alpn: Some(b"h2"),
            unique_id: &[7; 16],
        };
        let mut out = Vec::with_capacity(MAX_ENCODED);
        assert_eq!(counted(|| encode_v2(&mut out, &header)).1, 0, "version 2, {address}");
        out.clear();
        assert_eq!(counted(|| encode_v1(&mut out, client, header.server)).1, 0, "version 1, {address}");
    }
}
