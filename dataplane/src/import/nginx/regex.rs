//! Regular expressions that match finitely many names.
//!
//! Knows literals, groups with alternatives, classes and repetitions that have an end. An
//! expression with anything else, or that is not anchored at both ends, is taken for infinite.

/// More names than this are not written out.
const MOST: usize = 256;
/// Groups inside each other.
const DEEPEST: usize = 16;

/// The names that an expression matches, in lower case. `None`: more than can be written, or it
/// has something that is not understood.
///
/// `text` is what stands after nginx's `~`; `~*` leaves the asterisk, and means that case does not
/// matter.
pub fn finite(text: &str) -> Option<Vec<String>> {
    let (text, caseless) = match text.strip_prefix('*') {
        Some(rest) => (rest, true),
        None => (text, false),
    };
    // Names are compared in lower case here: an expression of capitals matches none of those.
    if !text.is_ascii() || (!caseless && text.bytes().any(|b| b.is_ascii_uppercase())) {
        return None;
    }
    let inner = text.strip_prefix('^')?.strip_suffix('$')?;
    // `\$` at the end is a literal, and alternatives reach over the anchors: `^a|b$`.
    if inner.ends_with('\\') {
        return None;
    }
    let mut parser = Parser { rest: inner.as_bytes(), depth: 0 };
    let (words, alternatives) = parser.alternatives()?;
    if !parser.rest.is_empty() || alternatives > 1 {
        return None;
    }
    let mut names: Vec<String> = words.into_iter().map(|word| word.to_ascii_lowercase()).collect();
    names.sort();
    names.dedup();
    Some(names)
}

struct Parser<'a> {
    rest: &'a [u8],
    depth: usize,
}

impl Parser<'_> {
    fn peek(&self) -> Option<u8> {
        self.rest.first().copied()
    }

    fn next(&mut self) -> Option<u8> {
        let (first, rest) = self.rest.split_first()?;
        self.rest = rest;
        Some(*first)
    }

    fn eat(&mut self, text: &[u8]) -> bool {
        let found = self.rest.strip_prefix(text);
        self.rest = found.unwrap_or(self.rest);
        found.is_some()
    }

    /// Words, and how many alternatives they come from.
    fn alternatives(&mut self) -> Option<(Vec<String>, usize)> {
        let (mut words, mut count) = (self.sequence()?, 1);
        while self.eat(b"|") {
            words.extend(self.sequence()?);
            count += 1;
        }
        (words.len() <= MOST).then_some((words, count))
    }

    fn sequence(&mut self) -> Option<Vec<String>> {
        let mut words = vec![String::new()];
        while let Some(next) = self.peek().filter(|next| !matches!(next, b'|' | b')')) {
            let piece = match next {
                b'(' => self.group()?,
                b'[' => self.class()?,
                _ => self.literal()?,
            };
            words = product(&words, &self.repeated(piece)?)?;
        }
        Some(words)
    }

    fn group(&mut self) -> Option<Vec<String>> {
        self.next();
        self.depth += 1;
        if self.depth > DEEPEST {
            return None;
        }
        if self.eat(b"?") && !self.eat(b":") {
            // `(?<name>` and `(?P<name>`; what else begins so is no plain group.
            self.eat(b"P");
            if !self.eat(b"<") {
                return None;
            }
            while self.peek().is_some_and(|c| c.is_ascii_alphanumeric() || c == b'_') {
                self.next();
            }
            if !self.eat(b">") {
                return None;
            }
        }
        let (words, _) = self.alternatives()?;
        self.depth -= 1;
        self.eat(b")").then_some(words)
    }

    fn class(&mut self) -> Option<Vec<String>> {
        self.next();
        let mut characters = Vec::new();
        loop {
            let first = match self.next()? {
                b']' if !characters.is_empty() => break,
                b'\\' if self.eat(b"d") => {
                    characters.extend(b'0'..=b'9');
                    continue;
                }
                b'\\' => self.next().filter(u8::is_ascii_punctuation)?,
                // `[^…]`, `[]…]` and `[[:alpha:]]` mean something else.
                b'^' | b']' | b'[' => return None,
                c => c,
            };
            if self.rest.first() == Some(&b'-') && self.rest.get(1).is_some_and(|c| *c != b']') {
                self.next();
                let last = self.next().filter(u8::is_ascii_alphanumeric)?;
                if !first.is_ascii_alphanumeric() || last < first {
                    return None;
                }
                characters.extend(first..=last);
            } else {
                characters.push(first);
            }
        }
        characters.sort_unstable();
        characters.dedup();
        Some(characters.into_iter().map(|c| char::from(c).to_string()).collect())
    }

    fn literal(&mut self) -> Option<Vec<String>> {
        let character = match self.next()? {
            b'\\' if self.eat(b"d") => return Some((b'0'..=b'9').map(|c| char::from(c).to_string()).collect()),
            b'\\' => self.next().filter(u8::is_ascii_punctuation)?,
            c if c.is_ascii_alphanumeric() || matches!(c, b'-' | b'_') => c,
            _ => return None,
        };
        Some(vec![char::from(character).to_string()])
    }

    /// The words so often as what follows says: `?`, `{2}`, `{1,3}`.
    fn repeated(&mut self, words: Vec<String>) -> Option<Vec<String>> {
        let (least, most) = match self.peek() {
            Some(b'?') => {
                self.next();
                (0, 1)
            }
            Some(b'{') => {
                self.next();
                let least = self.number()?;
                let most = if self.eat(b",") { self.number()? } else { least };
                if !self.eat(b"}") {
                    return None;
                }
                (least, most)
            }
            Some(b'*' | b'+') => return None,
            _ => return Some(words),
        };
        // A second one makes it lazy or possessive, or repeats the repetition.
        if least > most || matches!(self.peek(), Some(b'?' | b'+' | b'*' | b'{')) {
            return None;
        }
        let mut all = Vec::new();
        let mut so_far = vec![String::new()];
        for count in 0..=most {
            if count >= least {
                all.extend(so_far.iter().cloned());
            }
            if all.len() > MOST {
                return None;
            }
            if count < most {
                so_far = product(&so_far, &words)?;
            }
        }
        Some(all)
    }

    fn number(&mut self) -> Option<usize> {
        let digits = self.rest.iter().take_while(|b| b.is_ascii_digit()).count();
        let number = std::str::from_utf8(&self.rest[..digits]).ok()?.parse().ok()?;
        self.rest = &self.rest[digits..];
        (number <= MOST).then_some(number)
    }
}

/// Each of the first followed by each of the second.
fn product(first: &[String], second: &[String]) -> Option<Vec<String>> {
    /// No name is longer: RFC 1035 section 2.3.4.
    const LONGEST: usize = 253;
    if first.len() * second.len() > MOST {
        return None;
    }
    let words = first.iter().flat_map(|a| second.iter().map(move |b| format!("{a}{b}")));
    Some(words.filter(|word| word.len() <= LONGEST).collect())
}

#[cfg(test)]
mod tests {
    use super::finite;

    fn names(text: &str) -> Vec<String> {
        finite(text).unwrap_or_else(|| panic!("{text} is taken for infinite"))
    }

    #[test]
    fn what_ends_is_written_out() {
        assert_eq!(names(r"^(a|b)\.x\.test$"), ["a.x.test", "b.x.test"]);
        assert_eq!(names(r"^(?:www\.)?x\.test$"), ["www.x.test", "x.test"]);
        assert_eq!(names(r"*^N[1-3]\.x\.test$"), ["n1.x.test", "n2.x.test", "n3.x.test"]);
        assert_eq!(names(r"^(?<n>a|b)[xy]-\d{1}$").len(), 40);
        assert_eq!(names(r"^a{0,2}b$"), ["aab", "ab", "b"]);
        assert_eq!(names(r"^(a|b){2}$"), ["aa", "ab", "ba", "bb"]);
        assert_eq!(names(r"^[a-]$"), ["-", "a"]);
        assert_eq!(names(r"^(a|)b$"), ["ab", "b"]);
    }

    #[test]
    fn what_is_not_understood_is_infinite() {
        for text in [
            r".+\.x\.test",
            r"^.x$",
            r"^a+$",
            r"^a*$",
            r"^a|b$",
            r"^(a|b$",
            r"^[^a]$",
            r"^a{2,}$",
            r"^A\.x$",
            r"^a\$",
            r"^a?+$",
            r"^\w$",
            r"^é$",
            r"^[[:alpha:]]$",
            r"^(?=a)b$",
            r"^(?i)a$",
            r"^\d{3}$",
            r"^a.b$",
            r"x\.test$",
            r"^x",
            r"^a))$",
            r"^[b-a]$",
            r"^a^b$",
            r"^(((((((((((((((((a)))))))))))))))))$",
            r"^[]a]$",
            r"^a{1}{2}$",
            r"^$b$",
            r"^\bfoo$",
        ] {
            assert_eq!(finite(text), None, "{text}");
        }
    }
}
