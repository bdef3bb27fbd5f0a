//! Logs: what containers print, and the files that others may have changed.

use std::io::Cursor;

use bytes::BytesMut;
use futures_util::FutureExt;
use jiff::Timestamp;

use super::Steps;
use crate::logd::format::{LineCutter, MAX_LINE};
use crate::logd::frame::Frame;
use crate::runtime::termination;
use crate::server::logs::line::{Printer, Source, parse};
use crate::server::logs::options::LogOptions;
use crate::server::logs::tail;

/// Lines of a log file, as `kubectl logs` prints them.
pub fn log_lines(input: &[u8]) {
    let (flags, rest) = input.split_first().unwrap_or((&0, &[]));
    let limit = u64::from(flags >> 4);
    let options = LogOptions {
        timestamps: flags & 1 != 0,
        since: (flags & 2 != 0).then_some(Timestamp::UNIX_EPOCH),
        stream: (flags & 4 != 0).then_some(Source::Stderr),
        limit_bytes: (flags & 8 != 0).then_some(limit),
        ..LogOptions::default()
    };
    let bound = options.limit_bytes.map_or(usize::MAX, |limit| usize::try_from(limit).unwrap_or(0));
    let (mut printer, mut out) = (Printer::new(options), BytesMut::new());
    for line in rest.split_inclusive(|byte| *byte == b'\n') {
        if !printer.print(line, &mut out) {
            break;
        }
    }
    assert!(out.len() <= bound, "more than the limit was printed");
    // A line gets a newline at most; the rest is from the file.
    assert!(out.len() <= 2 * rest.len());
}

/// Where the last lines of a file begin.
pub fn log_tail(input: &[u8]) {
    let Some((count, file)) = input.split_first() else { return };
    let Ok(start) = tail::offset(&mut Cursor::new(file), u64::from(*count)) else { return };
    let lines: Vec<&[u8]> = file.split_inclusive(|byte| *byte == b'\n').collect();
    let kept = lines.len().min(usize::from(*count));
    let length: usize = lines.iter().rev().take(kept).map(|line| line.len()).sum();
    assert_eq!(usize::try_from(start), Ok(file.len() - length));
}

/// The last words of a container, out of its log.
pub fn termination_message(input: &[u8]) {
    assert!(termination::last_lines(input).len() <= 2048);
}

/// What a container prints, in pieces: nothing is lost, and every line can be read again.
pub fn log_cutter(input: &[u8]) {
    let (mut cutter, mut log, mut printed) = (LineCutter::default(), Vec::new(), Vec::new());
    for (_, data) in Steps(input) {
        cutter.feed("stdout", data, Timestamp::UNIX_EPOCH, &mut log);
        printed.extend_from_slice(data);
    }
    cutter.finish("stdout", Timestamp::UNIX_EPOCH, &mut log);
    let mut read = Vec::new();
    for line in log.split_inclusive(|byte| *byte == b'\n') {
        let Some(line) = parse(line) else { panic!("a line of our own cannot be read") };
        assert!(line.content.len() <= MAX_LINE);
        read.extend_from_slice(line.content);
        if !line.partial {
            read.push(b'\n');
        }
    }
    assert_eq!(read, printed);
}

/// Frames between the log writer and those who are attached.
pub fn logd_frames(input: &[u8]) {
    let mut rest = input;
    while let Some(Ok(frame)) = Frame::read(&mut rest).now_or_never() {
        let bytes = frame.encode();
        assert_eq!(Frame::read(&mut &bytes[..]).now_or_never().and_then(Result::ok), Some(frame));
    }
}
