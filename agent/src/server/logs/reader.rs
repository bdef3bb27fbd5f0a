//! Reads a log file by file, block by block. What is here waits for the disk: it runs on threads that may.

use std::ffi::{OsStr, OsString};
use std::fs::File;
use std::io::{self, Read, Seek, SeekFrom};
use std::os::unix::fs::MetadataExt;

use bytes::{Bytes, BytesMut};
use flate2::read::GzDecoder;

use super::folder::{Folder, name_of};
use super::line::Printer;
use super::options::LogOptions;
use super::tail;

const READ_SIZE: usize = 64 * 1024;
/// So much is read at most for one piece: a filter may want none of it, and the client may leave.
const READS: usize = 16;
/// Writers cut lines at 16 KiB. What is longer is no log, and is left out.
const MAX_LINE: usize = 1 << 20;
/// Files come and go while a log is rotated; then the folder is looked at again.
const ATTEMPTS: usize = 5;

pub(crate) struct Log {
    folder: Folder,
    /// The file that is being read; a rotated one may be compressed.
    source: Source,
    printer: Printer,
    /// The beginning of a line whose rest has not been read yet.
    line: Vec<u8>,
    /// The rest of a line that is too long is left out.
    skipping: bool,
    /// Nothing more may be sent.
    pub(super) full: bool,
}

enum Source {
    Plain(File),
    Packed { reader: Box<GzDecoder<File>>, name: OsString },
}

impl Log {
    pub(crate) fn open(folder: Folder, options: LogOptions) -> io::Result<Self> {
        let mut file = folder.open(folder.log())?;
        if let Some(lines) = options.tail_lines {
            let start = tail::offset(&mut file, lines)?;
            file.seek(SeekFrom::Start(start))?;
        }
        let (source, printer) = (Source::Plain(file), Printer::new(options));
        Ok(Self { folder, source, printer, line: Vec::new(), skipping: false, full: false })
    }

    /// What can be sent of the next blocks of the file; `None` at its end. May be empty.
    pub(crate) fn next_piece(&mut self) -> io::Result<Option<Bytes>> {
        let mut block = vec![0; READ_SIZE];
        let mut out = BytesMut::new();
        for _ in 0..READS {
            if self.full {
                return Ok(None);
            }
            let read = match &mut self.source {
                Source::Plain(file) => file.read(&mut block)?,
                Source::Packed { reader, .. } => reader.read(&mut block)?,
            };
            if read == 0 {
                return Ok(None);
            }
            self.take(block.get(..read).unwrap_or_default(), &mut out);
            if !out.is_empty() {
                break;
            }
        }
        Ok(Some(out.freeze()))
    }

    fn take(&mut self, block: &[u8], out: &mut BytesMut) {
        for part in block.split_inclusive(|byte| *byte == b'\n') {
            self.skipping |= self.line.len() + part.len() > MAX_LINE;
            if !self.skipping {
                self.line.extend_from_slice(part);
            }
            if part.ends_with(b"\n") {
                if !std::mem::take(&mut self.skipping) {
                    self.full |= !self.printer.print(&self.line, out);
                }
                self.line.clear();
            }
            if self.full {
                return;
            }
        }
    }

    /// Goes on with the file that came after the one that was read to its end, if there is one. True when there is
    /// more to read.
    pub(crate) fn open_next(&mut self) -> io::Result<bool> {
        for _ in 0..ATTEMPTS {
            match self.try_next() {
                Err(error) if error.kind() == io::ErrorKind::NotFound => {}
                result => return result,
            }
        }
        // In the middle of a rotation: its end is a change.
        Ok(false)
    }

    fn try_next(&mut self) -> io::Result<bool> {
        let own = match &mut self.source {
            Source::Plain(file) => {
                let current = self.folder.open(self.folder.log())?.metadata()?;
                let read = file.metadata()?;
                if (read.dev(), read.ino()) == (current.dev(), current.ino()) {
                    return Ok(false);
                }
                // Written after the end was reached and before the rotation: the file has more, and only now all.
                if read.len() > file.stream_position()? {
                    return Ok(true);
                }
                name_of(file)?
            }
            Source::Packed { name, .. } => name.clone(),
        };
        let next = successor(&own, self.folder.log(), &self.folder.rotated()?);
        let file = self.folder.open(&next)?;
        self.source = if next.to_string_lossy().ends_with(".gz") {
            Source::Packed { reader: Box::new(GzDecoder::new(file)), name: next }
        } else {
            Source::Plain(file)
        };
        Ok(true)
    }

    /// The log's own name.
    pub(super) fn name(&self) -> OsString {
        self.folder.log().to_owned()
    }
}

/// The file that was begun after `own`: the next rotated one, or the log itself.
fn successor(own: &OsStr, log: &OsStr, rotated: &[OsString]) -> OsString {
    let own = stem(own);
    // Replaced without a rotation: what came after it is whatever is there now.
    if own == stem(log) {
        return log.to_owned();
    }
    let next = rotated.iter().find(|file| stem(file) > own);
    next.cloned().unwrap_or_else(|| log.to_owned())
}

/// The name without what compression or removal put at its end.
fn stem(name: &OsStr) -> String {
    let name = name.to_string_lossy();
    let name = name.strip_suffix(" (deleted)").unwrap_or(&name);
    name.strip_suffix(".gz").unwrap_or(name).to_owned()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_compressed_file_follows_its_elder() {
        let files = ["l.20260101", "l.20260102.gz", "l.20260103"].map(OsString::from);
        let next = |own: &str| successor(OsStr::new(own), OsStr::new("l"), &files);
        assert_eq!(next("l.20260101"), files[1]);
        assert_eq!(next("l.20260102.gz"), files[2]);
        assert_eq!(next("l.20260101 (deleted)"), files[1]);
        assert_eq!(next("l.20260103"), "l");
        assert_eq!(next("l (deleted)"), "l");
    }

    #[test]
    fn a_line_without_end_is_left_out_and_takes_no_memory() {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("0.log");
        let line = |text: &str| format!("2026-01-02T15:04:05Z stdout F {text}\n");
        let endless = "x".repeat(3 * MAX_LINE);
        std::fs::write(&path, line("a") + &endless + &line("") + &line("b")).unwrap();
        let mut log = Log::open(Folder::of(&path).unwrap(), LogOptions::default()).unwrap();
        let mut text = Vec::new();
        while let Some(piece) = log.next_piece().unwrap() {
            text.extend_from_slice(&piece);
            assert!(log.line.capacity() <= 4 * MAX_LINE);
        }
        assert_eq!(text, b"a\nb\n");
    }

    /// Compression leaves a moment in which the next file has another name than was read.
    #[test]
    fn a_file_that_went_during_the_look_is_looked_for_again() {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("0.log");
        std::fs::write(&path, "").unwrap();
        let mut log = Log::open(Folder::of(&path).unwrap(), LogOptions::default()).unwrap();
        std::fs::rename(&path, dir.path().join("0.log.20260101")).unwrap();
        assert!(!log.open_next().unwrap(), "the new log is not there yet, which is no error");
        std::fs::write(&path, "").unwrap();
        assert!(log.open_next().unwrap());
    }
}
