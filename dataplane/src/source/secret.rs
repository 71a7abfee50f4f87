//! Files that hold one secret: a token, or what forges sign with.

use std::fs::File;
use std::io::Read;
use std::path::Path;

/// Bytes of such a file, at most.
const MOST: u64 = 4096;

/// The secret: the one line that the file has.
///
/// # Errors
/// Why there is none, in a line that names the file and what to do, and never quotes what is in it.
pub fn read(file: &Path) -> Result<String, String> {
    let named = |what: &str| format!("{}: {what}", file.display());
    let mut bytes = Vec::new();
    let opened = File::open(file).and_then(|file| file.take(MOST + 1).read_to_end(&mut bytes));
    opened.map_err(|error| named(&error.to_string()))?;
    if bytes.len() as u64 > MOST {
        return Err(named("it is larger than 4KiB; write the secret into it, and nothing else"));
    }
    let text = String::from_utf8(bytes).map_err(|_| named("it is not UTF-8 text; write the secret as one line"))?;
    let secret = text.trim();
    if secret.is_empty() {
        return Err(named("it is empty; write the secret into it, as one line"));
    }
    if secret.lines().count() > 1 {
        return Err(named("it has more than one line; leave the line of the secret, and no other"));
    }
    if secret.contains(|c: char| c.is_control()) {
        return Err(named("there are control characters in it; write the secret as one line of text"));
    }
    Ok(secret.to_owned())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_secret_is_one_line_and_what_is_not_is_told_without_being_quoted() {
        let folder = tempfile::tempdir().unwrap();
        let file = folder.path().join("token");
        let of = |text: &[u8]| {
            std::fs::write(&file, text).unwrap();
            read(&file)
        };
        for text in ["s3cret", "s3cret\n", "\r\n  s3cret \r\n\n"] {
            assert_eq!(of(text.as_bytes()).as_deref(), Ok("s3cret"), "{text:?}");
        }
        assert_eq!(of(b"It's a secret\n").as_deref(), Ok("It's a secret"));
        for (text, why) in [
            (&b""[..], "empty"),
            (b" \n\n", "empty"),
            (b"s3cret\nother\n", "more than one line"),
            (b"s3cret\rother", "control characters"),
            (b"s3cret\0", "control characters"),
            (b"s3cret\xff", "not UTF-8"),
            (&[b's'; 5000], "larger than 4KiB"),
        ] {
            let error = of(text).unwrap_err();
            assert!(error.contains(why) && error.starts_with(&file.display().to_string()), "{error}");
            assert!(!error.contains("s3cret"), "{error}");
        }
        std::fs::remove_file(&file).unwrap();
        assert!(read(&file).unwrap_err().contains("token"));
    }
}
