//! No input makes the HTTP machine panic; no cut changes its verdict; and what it lets through has
//! one reading: the head that is passed on is one request for the host that was looked up, without
//! a body, to httparse as to us, and the redirection is one answer.

#![no_main]

use dataplane::http::{Input, Machine, Progress, Request};
use dataplane::reject::Reason;
use libfuzzer_sys::fuzz_target;

const MAX_BYTES: usize = 16384;

#[derive(Debug, Clone, PartialEq)]
enum Answer {
    NeedMore,
    Request(Request),
    Reject(Reason),
}

impl From<Progress<'_>> for Answer {
    fn from(progress: Progress<'_>) -> Self {
        match progress {
            Progress::NeedMore => Self::NeedMore,
            Progress::Request(request) => Self::Request(request.clone()),
            Progress::Reject(reason) => Self::Reject(reason),
        }
    }
}

fuzz_target!(|data: &[u8]| {
    let whole = Answer::from(Machine::new(MAX_BYTES).input(Input::Bytes(data)));
    let mut machine = Machine::new(MAX_BYTES);
    let mut last = Answer::NeedMore;
    for byte in data {
        let answer = Answer::from(machine.input(Input::Bytes(&[*byte])));
        assert!(last == Answer::NeedMore || answer == last, "{last:?} became {answer:?}");
        last = answer;
    }
    assert_eq!(last, whole);

    let Answer::Request(request) = whole else { return };
    let Some(host) = request.host else { return };
    let mut headers = [httparse::EMPTY_HEADER; 4];
    if let Some(head) = request.challenge() {
        let mut parsed = httparse::Request::new(&mut headers);
        assert_eq!(parsed.parse(head), Ok(httparse::Status::Complete(head.len())), "{}", head.escape_ascii());
        assert!(parsed.path.unwrap().starts_with("/.well-known/acme-challenge/"));
        let names: Vec<&str> = parsed.headers.iter().map(|header| header.name).collect();
        assert!(names == ["Host", "Connection"] || names == ["Host", "User-Agent", "Connection"], "{names:?}");
        assert_eq!(parsed.headers[0].value, host.as_str().as_bytes());
        let Answer::Request(again) = Machine::new(MAX_BYTES).input(Input::Bytes(head)).into() else {
            panic!("{}", head.escape_ascii())
        };
        assert_eq!(again, request);
    }
    let answer = request.redirect(&host);
    let mut parsed = httparse::Response::new(&mut headers);
    assert_eq!(parsed.parse(&answer), Ok(httparse::Status::Complete(answer.len())), "{}", answer.escape_ascii());
    assert_eq!((parsed.code, parsed.headers.len()), (Some(308), 3));
});
