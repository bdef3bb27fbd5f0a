//! The CRI's log format: `<time> <stream> <P|F> <text>`, one line each; P is a part of a line, F its end.

use jiff::Timestamp;

/// Longer lines are split into parts, as kubelet's log reader expects.
pub(crate) const MAX_LINE: usize = 16 << 10;

/// Cuts one stream into log lines. Pure but for the clock that the caller passes in.
#[derive(Default)]
pub(crate) struct LineCutter {
    pending: Vec<u8>,
}

impl LineCutter {
    /// Takes what was read and appends every complete line, formatted, to `out`.
    pub(crate) fn feed(
        &mut self,
        stream: &str,
        mut data: &[u8],
        now: Timestamp,
        out: &mut Vec<u8>,
    ) {
        while let Some(end) = data.iter().position(|byte| *byte == b'\n') {
            self.take(&data[..end], stream, now, out);
            self.emit(stream, b'F', now, out);
            data = &data[end + 1..];
        }
        self.take(data, stream, now, out);
    }

    /// The stream has ended: a last line without its newline is a part.
    pub(crate) fn finish(&mut self, stream: &str, now: Timestamp, out: &mut Vec<u8>) {
        if !self.pending.is_empty() {
            self.emit(stream, b'P', now, out);
        }
    }

    fn take(&mut self, mut data: &[u8], stream: &str, now: Timestamp, out: &mut Vec<u8>) {
        while self.pending.len() + data.len() > MAX_LINE {
            let (part, rest) = data.split_at(MAX_LINE - self.pending.len());
            self.pending.extend_from_slice(part);
            self.emit(stream, b'P', now, out);
            data = rest;
        }
        self.pending.extend_from_slice(data);
    }

    fn emit(&mut self, stream: &str, tag: u8, now: Timestamp, out: &mut Vec<u8>) {
        out.extend_from_slice(format!("{now:.9} {stream} ").as_bytes());
        out.extend_from_slice(&[tag, b' ']);
        out.append(&mut self.pending);
        out.push(b'\n');
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn cut(chunks: &[&[u8]]) -> String {
        let mut cutter = LineCutter::default();
        let mut out = Vec::new();
        for chunk in chunks {
            cutter.feed("stdout", chunk, Timestamp::UNIX_EPOCH, &mut out);
        }
        cutter.finish("stdout", Timestamp::UNIX_EPOCH, &mut out);
        String::from_utf8(out).unwrap()
    }

    #[test]
    fn lines_across_reads_empty_lines_and_a_last_part() {
        let want = "1970-01-01T00:00:00.000000000Z stdout F hello\n\
                    1970-01-01T00:00:00.000000000Z stdout F \n\
                    1970-01-01T00:00:00.000000000Z stdout P end\n";
        assert_eq!(cut(&[b"hel", b"lo\n\ne", b"nd"]), want);
    }

    #[test]
    fn a_long_line_is_split_and_nothing_of_it_is_lost() {
        let line = vec![b'x'; 2 * MAX_LINE + 5];
        let text = cut(&[&line, b"\n"]);
        let tags: Vec<&str> = text.lines().map(|l| l.split(' ').nth(2).unwrap()).collect();
        assert_eq!(tags, ["P", "P", "F"]);
        let total: usize = text.lines().map(|l| l.splitn(4, ' ').nth(3).unwrap().len()).sum();
        assert_eq!(total, line.len());
    }
}
