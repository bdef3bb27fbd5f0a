//! Lines of a CRI log, `<time> <stream> <tags> <content>`, and what of them a client gets.

use bytes::{BufMut, BytesMut};
use jiff::Timestamp;

use super::options::LogOptions;

/// Which of its outputs a container wrote to.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Source {
    Stdout,
    Stderr,
}

/// One physical line of a log file.
#[derive(Debug, PartialEq, Eq)]
pub struct Line<'a> {
    pub time: &'a [u8],
    pub source: Source,
    /// The container's line goes on in the next physical line.
    pub partial: bool,
    pub content: &'a [u8],
}

/// Reads a physical line; `None` when it is none, as after a crash in the middle of a write.
pub fn parse(line: &[u8]) -> Option<Line<'_>> {
    let line = line.strip_suffix(b"\n").unwrap_or(line);
    let mut fields = line.splitn(4, |byte| *byte == b' ');
    let (time, source, tags) = (fields.next()?, fields.next()?, fields.next()?);
    let source = match source {
        b"stdout" => Source::Stdout,
        b"stderr" => Source::Stderr,
        _ => return None,
    };
    // Tags are separated by colons; the first says whether the line is whole.
    let partial = match tags.split(|byte| *byte == b':').next()? {
        b"P" => true,
        b"F" => false,
        _ => return None,
    };
    Some(Line { time, source, partial, content: fields.next().unwrap_or_default() })
}

#[derive(Debug, Default)]
struct Within {
    stdout: bool,
    stderr: bool,
}

/// Turns physical lines into what the client asked for.
#[derive(Debug)]
pub struct Printer {
    options: LogOptions,
    /// Bytes that may still be sent.
    left: u64,
    /// Whether the line before, of either stream, was only a part.
    within: Within,
}

impl Printer {
    pub fn new(options: LogOptions) -> Self {
        Self { left: options.limit_bytes.unwrap_or(u64::MAX), options, within: Within::default() }
    }

    /// Appends what is to be sent of a physical line; `false` when nothing more may be sent.
    pub fn print(&mut self, line: &[u8], out: &mut BytesMut) -> bool {
        let Some(line) = parse(line) else { return self.left > 0 };
        let within = match line.source {
            Source::Stdout => &mut self.within.stdout,
            Source::Stderr => &mut self.within.stderr,
        };
        let continues = std::mem::replace(within, line.partial);
        let other_stream = self.options.stream.is_some_and(|stream| stream != line.source);
        if other_stream || self.is_too_old(line.time) {
            return self.left > 0;
        }
        if self.options.timestamps && !continues {
            self.put(line.time, out);
            self.put(b" ", out);
        }
        self.put(line.content, out);
        if !line.partial {
            self.put(b"\n", out);
        }
        self.left > 0
    }

    fn is_too_old(&self, time: &[u8]) -> bool {
        let Some(since) = self.options.since else { return false };
        let time = std::str::from_utf8(time).ok().and_then(|text| text.parse::<Timestamp>().ok());
        time.is_some_and(|time| time < since)
    }

    fn put(&mut self, bytes: &[u8], out: &mut BytesMut) {
        let allowed = bytes.len().min(usize::try_from(self.left).unwrap_or(usize::MAX));
        out.put_slice(bytes.get(..allowed).unwrap_or(bytes));
        self.left = self.left.saturating_sub(u64::try_from(allowed).unwrap_or(self.left));
    }
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    fn print(options: LogOptions, lines: &[&str]) -> String {
        let (mut printer, mut out) = (Printer::new(options), BytesMut::new());
        for line in lines {
            if !printer.print(line.as_bytes(), &mut out) {
                break;
            }
        }
        String::from_utf8(out.to_vec()).unwrap()
    }

    const LINES: &[&str] = &[
        "2026-01-02T15:04:05.1Z stdout F one\n",
        "2026-01-02T15:04:06.1Z stderr P tw\n",
        "2026-01-02T15:04:07.1Z stdout F  spaced out \n",
        "2026-01-02T15:04:08.1Z stderr F o\n",
        "garbage\n",
        "2026-01-02T15:04:09.1Z stdout F\n",
    ];

    #[test]
    fn contents_without_their_heads() {
        assert_eq!(print(LogOptions::default(), LINES), "one\ntw spaced out \no\n\n");
    }

    #[test]
    fn a_line_in_parts_has_one_time() {
        let options =
            LogOptions { timestamps: true, stream: Some(Source::Stderr), ..LogOptions::default() };
        assert_eq!(print(options, LINES), "2026-01-02T15:04:06.1Z two\n");
    }

    #[test]
    fn since_and_limit() {
        let since = Some("2026-01-02T15:04:07Z".parse().unwrap());
        let options = LogOptions { since, ..LogOptions::default() };
        assert_eq!(print(options, LINES), " spaced out \no\n\n");
        let options = LogOptions { limit_bytes: Some(5), ..LogOptions::default() };
        assert_eq!(print(options, LINES), "one\nt");
    }

    proptest! {
        #[test]
        fn no_bytes_make_it_panic(line in prop::collection::vec(any::<u8>(), 0..80)) {
            let mut printer = Printer::new(LogOptions { timestamps: true, ..LogOptions::default() });
            printer.print(&line, &mut BytesMut::new());
        }
    }
}
