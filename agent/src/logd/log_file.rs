//! A log file that is rotated by size. The writer rotates itself, so nothing is lost between two files.

use std::fs::{self, File};
use std::io::{self, Write};
use std::os::unix::fs::MetadataExt;
use std::path::{Path, PathBuf};

use jiff::civil::DateTime;
use jiff::tz::TimeZone;
use jiff::{SignedDuration, Timestamp};
use nix::fcntl::{OFlag, OpenHow, ResolveFlag, openat2};
use nix::sys::stat::Mode;

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
        // A log that a cleaner removed begins again: what went to the removed file would be lost.
        let removed = |file: &File| file.metadata().is_ok_and(|found| found.nlink() == 0);
        if self.file.as_ref().is_some_and(removed) {
            self.file = None;
        }
        if self.file.is_none() {
            let file = create(&self.spec.path)?;
            self.size = file.metadata()?.len();
            self.file = Some(file);
        }
        self.file.as_mut().ok_or_else(|| io::Error::other("not open"))
    }

    fn rotate(&mut self) -> io::Result<()> {
        let now = Timestamp::now().to_zoned(TimeZone::UTC).datetime();
        let newest = self.rotated()?.last().and_then(|path| stamp_of(path));
        let stamp = stamp(now, newest).strftime(STAMP).to_string();
        let rotated = with_suffix(&self.spec.path, &stamp);
        match fs::rename(&self.spec.path, &rotated) {
            // Somebody removed it: a new one begins.
            Err(error) if error.kind() != io::ErrorKind::NotFound => return Err(error),
            _ => {}
        }
        self.file = None;
        self.size = 0;
        if let Err(error) = self.remove_oldest() {
            // The lines that wait to be written are worth more.
            tracing::warn!(path = %self.spec.path.display(), %error, "Cannot remove an old log file");
        }
        Ok(())
    }

    /// `max_files` counts the current file, too.
    fn remove_oldest(&self) -> io::Result<()> {
        let rotated = self.rotated()?;
        let keep = (self.spec.max_files.max(2) - 1) as usize;
        for old in rotated.iter().take(rotated.len().saturating_sub(keep)) {
            fs::remove_file(old)?;
        }
        Ok(())
    }

    /// The rotated files, oldest first.
    fn rotated(&self) -> io::Result<Vec<PathBuf>> {
        let (Some(folder), Some(name)) = (self.spec.path.parent(), self.spec.path.file_name())
        else {
            return Ok(Vec::new());
        };
        let prefix = format!("{}.", name.to_string_lossy());
        let mut rotated: Vec<PathBuf> = fs::read_dir(folder)?
            .flatten()
            .filter(|entry| entry.file_name().to_string_lossy().starts_with(&prefix))
            .map(|entry| entry.path())
            .collect();
        // The names sort by time.
        rotated.sort();
        Ok(rotated)
    }
}

/// The end of a rotated file's name: to the nanosecond, so that the names of one second sort by time, too.
const STAMP: &str = "%Y%m%d-%H%M%S.%9f";

/// The time in a rotated file's name.
fn stamp_of(path: &Path) -> Option<DateTime> {
    let name = path.file_name()?.to_str()?.trim_end_matches(".gz");
    let (rest, fraction) = name.rsplit_once('.')?;
    let (_, seconds) = rest.rsplit_once('.')?;
    DateTime::strptime("%Y%m%d-%H%M%S.%f", format!("{seconds}.{fraction}")).ok()
}

/// The time for the next name: later than the newest that is there, also when the clock stepped back. Else the newest
/// file would be taken for the oldest, and removed.
fn stamp(now: DateTime, newest: Option<DateTime>) -> DateTime {
    match newest {
        Some(newest) if newest >= now => {
            newest.checked_add(SignedDuration::from_nanos(1)).unwrap_or(now)
        }
        _ => now,
    }
}

/// Opens a log to append to. A pod may have all logs mounted (hostPath), so that no link below their folder is followed:
/// `<all logs>/<pod>/<container>/<run>.log`.
fn create(path: &Path) -> io::Result<File> {
    let root = path.ancestors().nth(3).unwrap_or(Path::new("/"));
    let below = path.strip_prefix(root).unwrap_or(path);
    let folder = File::open(root)?;
    let how = OpenHow::new()
        .flags(
            OFlag::O_WRONLY
                | OFlag::O_APPEND
                | OFlag::O_CREAT
                | OFlag::O_CLOEXEC
                | OFlag::O_NONBLOCK,
        )
        .mode(Mode::from_bits_truncate(0o640))
        .resolve(ResolveFlag::RESOLVE_BENEATH | ResolveFlag::RESOLVE_NO_SYMLINKS);
    let file = File::from(openat2(&folder, below, how)?);
    if file.metadata()?.is_file() { Ok(file) } else { Err(io::Error::other("not a regular file")) }
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

    fn log(dir: &tempfile::TempDir) -> (LogFile, PathBuf) {
        let path = dir.path().join("pod/main/0.log");
        fs::create_dir_all(path.parent().unwrap()).unwrap();
        (LogFile::new(LogSpec { path: path.clone(), max_bytes: 20, max_files: 3 }), path)
    }

    #[test]
    fn a_log_that_was_removed_begins_again() {
        let dir = tempfile::tempdir().unwrap();
        let (mut log, path) = log(&dir);
        log.append(b"line 1 of the log\n");
        fs::remove_file(&path).unwrap();
        for number in 2..=9 {
            log.append(format!("line {number} of the log\n").as_bytes());
        }
        assert_eq!(fs::read_to_string(&path).unwrap(), "line 9 of the log\n");
    }

    #[test]
    fn a_link_in_the_place_of_a_log_or_of_its_folder_is_not_followed() {
        let dir = tempfile::tempdir().unwrap();
        let (log_file, path) = log(&dir);
        drop(log_file);
        let elsewhere = dir.path().join("elsewhere");
        fs::write(&elsewhere, "").unwrap();
        fs::remove_file(&path).unwrap();
        std::os::unix::fs::symlink(&elsewhere, &path).unwrap();
        let (mut log_file, _) = log(&dir);
        log_file.append(b"planted\n");
        fs::remove_dir_all(dir.path().join("pod/main")).unwrap();
        fs::create_dir(dir.path().join("target")).unwrap();
        std::os::unix::fs::symlink("../target", dir.path().join("pod/main")).unwrap();
        log_file.append(b"planted\n");
        assert_eq!(fs::read_to_string(&elsewhere).unwrap(), "");
        assert_eq!(fs::read_dir(dir.path().join("target")).unwrap().count(), 0);
    }

    #[test]
    fn a_clock_that_steps_back_does_not_make_the_newest_file_the_oldest() {
        let time = |text: &str| text.parse::<DateTime>().unwrap();
        let (earlier, later) = (time("2026-01-01T00:00:00"), time("2026-01-02T00:00:00.000000007"));
        assert_eq!(stamp(later, Some(earlier)), later);
        assert_eq!(stamp(earlier, Some(later)), time("2026-01-02T00:00:00.000000008"));
        let name = format!("/l/0.log.{}", later.strftime(STAMP));
        assert_eq!(stamp_of(Path::new(&name)), Some(later));
        assert_eq!(stamp_of(Path::new(&(name + ".gz"))), Some(later));
        assert_eq!(stamp_of(Path::new("/l/0.log")), None);
    }
}
