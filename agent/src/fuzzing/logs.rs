//! Logs: what containers print, and the files that others may have changed.

use std::collections::VecDeque;
use std::fs::{self, File};
use std::io::{self, Cursor, Write};
use std::path::{Path, PathBuf};

use bytes::BytesMut;
use flate2::Compression;
use flate2::write::GzEncoder;
use futures_util::FutureExt;
use jiff::Timestamp;

use super::Steps;
use crate::logd::format::{LineCutter, MAX_LINE};
use crate::logd::frame::Frame;
use crate::runtime::termination;
use crate::server::logs::folder::Folder;
use crate::server::logs::line::{Printer, Source, parse};
use crate::server::logs::options::LogOptions;
use crate::server::logs::reader::Log;
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

/// A log that is written, rotated, compressed and followed in any order: every line arrives, once, in order.
pub fn log_rotation(input: &[u8]) {
    let folder = std::env::temp_dir().join(format!("keelson-fuzz-{}", std::process::id()));
    let written = Rotation::new(&folder).and_then(|mut log| {
        for (step, data) in Steps(input).take(32) {
            log.step(step, data)?;
        }
        log.finish()
    });
    drop(fs::remove_dir_all(&folder));
    if let Err(error) = written {
        panic!("the log cannot be followed: {error}");
    }
}

struct Rotation {
    folder: PathBuf,
    current: File,
    /// Rotated files that are not compressed yet, and how many there were in all.
    rotated: VecDeque<PathBuf>,
    rotations: u32,
    follower: Log,
    printed: Vec<u8>,
    sent: Vec<u8>,
}

impl Rotation {
    fn new(folder: &Path) -> io::Result<Self> {
        fs::create_dir_all(folder)?;
        let path = folder.join("0.log");
        let current = File::create(&path)?;
        Ok(Self {
            folder: folder.to_owned(),
            current,
            rotated: VecDeque::new(),
            rotations: 0,
            follower: Log::open(Folder::of(&path)?, LogOptions::default())?,
            printed: Vec::new(),
            sent: Vec::new(),
        })
    }

    fn step(&mut self, step: u8, data: &[u8]) -> io::Result<()> {
        match step % 5 {
            0 | 1 => {
                let words = data.iter().copied().filter(|byte| *byte != b'\n');
                let line = words.chain([b'\n']).collect::<Vec<u8>>();
                self.current.write_all(b"2026-01-02T15:04:05Z stdout F ")?;
                self.current.write_all(&line)?;
                self.printed.extend(line);
            }
            2 => {
                self.rotations += 1;
                let old = self.folder.join(format!("0.log.{:04}", self.rotations));
                fs::rename(self.folder.join("0.log"), &old)?;
                self.current = File::create(self.folder.join("0.log"))?;
                self.rotated.push_back(old);
            }
            3 => {
                let Some(old) = self.rotated.pop_front() else { return Ok(()) };
                let mut packed = old.clone().into_os_string();
                packed.push(".gz");
                let mut packer = GzEncoder::new(File::create(&packed)?, Compression::fast());
                packer.write_all(&fs::read(&old)?)?;
                packer.finish()?;
                fs::remove_file(old)?;
            }
            _ => self.follow()?,
        }
        Ok(())
    }

    fn follow(&mut self) -> io::Result<()> {
        loop {
            while let Some(piece) = self.follower.next_piece()? {
                self.sent.extend_from_slice(&piece);
            }
            if !self.follower.open_next()? {
                return Ok(());
            }
        }
    }

    fn finish(mut self) -> io::Result<()> {
        self.follow()?;
        assert_eq!(self.sent, self.printed, "what was followed is not what was printed");
        Ok(())
    }
}

/// Frames between the log writer and those who are attached.
pub fn logd_frames(input: &[u8]) {
    let mut rest = input;
    while let Some(Ok(frame)) = Frame::read(&mut rest).now_or_never() {
        let bytes = frame.encode();
        assert_eq!(Frame::read(&mut &bytes[..]).now_or_never().and_then(Result::ok), Some(frame));
    }
}
