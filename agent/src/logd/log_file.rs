//! A log file that is rotated by size. The writer rotates itself, so nothing is lost between two files.

use std::fs::{self, File, OpenOptions};
use std::io::{self, Write};
use std::path::{Path, PathBuf};

use jiff::Timestamp;

use super::LogSpec;

/// Open for appending; opened again when it could not be.
pub(crate) struct LogFile {
    spec: LogSpec,
    file: Option<File>,
    size: u64,
}

impl LogFile {
    /// The file is there from the start: a container that prints nothing has an empty log.
    pub(crate) fn new(spec: LogSpec) -> LogFile {
        let mut log = LogFile { spec, file: None, size: 0 };
        if let Err(error) = log.open() {
            tracing::error!(path = %log.spec.path.display(), %error, "A container's log cannot be opened");
        }
        log
    }

    /// Appends whole lines. A full disk loses them, said once per failure; the container is never blocked by it.
    pub(crate) fn append(&mut self, lines: &[u8]) {
        if lines.is_empty() {
            return;
        }
        if let Err(error) = self.try_append(lines) {
            tracing::error!(path = %self.spec.path.display(), %error, "A container's output cannot be written");
            self.file = None;
        }
    }

    fn try_append(&mut self, lines: &[u8]) -> io::Result<()> {
        if self.size > 0 && self.size + lines.len() as u64 > self.spec.max_bytes {
            self.rotate()?;
        }
        self.open()?.write_all(lines)?;
        self.size += lines.len() as u64;
        Ok(())
    }

    fn open(&mut self) -> io::Result<&mut File> {
        if self.file.is_none() {
            let file = OpenOptions::new().append(true).create(true).open(&self.spec.path)?;
            self.size = file.metadata()?.len();
            self.file = Some(file);
        }
        self.file.as_mut().ok_or_else(|| io::Error::other("not open"))
    }

    fn rotate(&mut self) -> io::Result<()> {
        // To the nanosecond, so that the names of one second sort by time, too.
        let stamp = Timestamp::now().strftime("%Y%m%d-%H%M%S.%9f");
        let rotated = with_suffix(&self.spec.path, &stamp.to_string());
        fs::rename(&self.spec.path, &rotated)?;
        self.file = None;
        self.size = 0;
        self.remove_oldest()
    }

    /// `max_files` counts the current file, too.
    fn remove_oldest(&self) -> io::Result<()> {
        let (Some(folder), Some(name)) = (self.spec.path.parent(), self.spec.path.file_name())
        else {
            return Ok(());
        };
        let prefix = format!("{}.", name.to_string_lossy());
        let mut rotated: Vec<PathBuf> = fs::read_dir(folder)?
            .flatten()
            .filter(|entry| entry.file_name().to_string_lossy().starts_with(&prefix))
            .map(|entry| entry.path())
            .collect();
        // The names sort by time.
        rotated.sort();
        let keep = (self.spec.max_files.max(2) - 1) as usize;
        for old in rotated.iter().take(rotated.len().saturating_sub(keep)) {
            fs::remove_file(old)?;
        }
        Ok(())
    }
}

fn with_suffix(path: &Path, suffix: &str) -> PathBuf {
    let mut name = path.as_os_str().to_owned();
    name.push(".");
    name.push(suffix);
    PathBuf::from(name)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn rotation_keeps_the_newest_files_and_every_line_of_them() {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("0.log");
        let mut log = LogFile::new(LogSpec { path: path.clone(), max_bytes: 20, max_files: 3 });
        for number in 0..10 {
            log.append(format!("line {number}\n").as_bytes());
        }
        let mut files: Vec<PathBuf> =
            fs::read_dir(dir.path()).unwrap().map(|e| e.unwrap().path()).collect();
        files.sort();
        assert_eq!(files.len(), 3, "{files:?}");
        // The current file sorts first, the rotated ones by time.
        files.rotate_left(1);
        let text: String = files.iter().map(|f| fs::read_to_string(f).unwrap()).collect();
        assert_eq!(text, "line 4\nline 5\nline 6\nline 7\nline 8\nline 9\n");
    }
}
