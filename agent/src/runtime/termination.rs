//! Last words: the file that a container may write them to (`terminationMessagePath`), or else the end of its log.

use std::fs::{self, File};
use std::io::{self, Read, Seek, SeekFrom};
use std::os::unix::fs::PermissionsExt;
use std::path::{Path, PathBuf};

use super::RuntimeError;

/// What a message may be long; the end of a longer one counts (as the kubelet has it).
const MESSAGE_BYTES: usize = 4096;
/// What is taken of a log: no more than this many bytes of no more than that many lines.
const LOG_BYTES: usize = 2048;
const LOG_LINES: usize = 80;
/// Enough of a log file to hold that, each line with its time and stream.
const LOG_TAIL: u64 = 64 << 10;

/// Makes the file that is mounted into container `id`. Whoever the container runs as may write to it.
///
/// # Errors
/// When it cannot be made.
pub(crate) fn prepare(root_dir: &Path, id: &str) -> Result<PathBuf, RuntimeError> {
    let path = path(root_dir, id);
    if let Some(folder) = path.parent() {
        fs::create_dir_all(folder).map_err(RuntimeError::system("create", folder))?;
    }
    fs::write(&path, "").map_err(RuntimeError::system("create", &path))?;
    fs::set_permissions(&path, fs::Permissions::from_mode(0o666))
        .map_err(RuntimeError::system("make writable", &path))?;
    Ok(path)
}

/// The message of container `id`; that of its log, when a log is given and the container has said nothing.
pub(crate) fn message(root_dir: &Path, id: &str, log: Option<&Path>) -> String {
    let own = tail(&path(root_dir, id), MESSAGE_BYTES as u64).unwrap_or_default();
    match log {
        Some(log) if own.is_empty() => last_lines(&tail(log, LOG_TAIL).unwrap_or_default()),
        _ => String::from_utf8_lossy(&own).into_owned(),
    }
}

/// Forgets the file of container `id`.
pub(crate) fn remove(root_dir: &Path, id: &str) {
    // One that stays is of a container that no longer exists: it is never read again.
    drop(fs::remove_file(path(root_dir, id)));
}

fn path(root_dir: &Path, id: &str) -> PathBuf {
    root_dir.join("termination").join(id)
}

fn tail(path: &Path, bytes: u64) -> io::Result<Vec<u8>> {
    let mut file = File::open(path)?;
    let length = file.metadata()?.len();
    file.seek(SeekFrom::Start(length.saturating_sub(bytes)))?;
    let mut end = Vec::new();
    file.take(bytes).read_to_end(&mut end)?;
    Ok(end)
}

/// The text at the end of a log in the CRI's format.
pub(crate) fn last_lines(log: &[u8]) -> String {
    let log = String::from_utf8_lossy(log);
    // The first line may have lost its beginning, and has no third space then or another text behind it: it is one of many.
    let lines: Vec<&str> = log.lines().filter(|line| line.splitn(4, ' ').count() == 4).collect();
    let mut text = String::new();
    for line in &lines[lines.len().saturating_sub(LOG_LINES)..] {
        let mut parts = line.splitn(4, ' ').skip(2);
        let (tag, words) = (parts.next().unwrap_or_default(), parts.next().unwrap_or_default());
        text.push_str(words);
        if tag != "P" {
            text.push('\n');
        }
    }
    let mut start = text.len().saturating_sub(LOG_BYTES);
    while !text.is_char_boundary(start) {
        start += 1;
    }
    text.split_off(start)
}

#[cfg(test)]
mod tests {
    use super::*;

    fn log(lines: impl Iterator<Item = String>) -> Vec<u8> {
        lines
            .map(|line| format!("2026-01-01T00:00:00.000000000Z stdout F {line}\n"))
            .collect::<String>()
            .into_bytes()
    }

    #[test]
    fn the_end_of_a_log_is_eighty_lines_and_two_kilobytes_at_most() {
        assert_eq!(last_lines(&log(["a b".to_owned(), String::new()].into_iter())), "a b\n\n");
        let many = last_lines(&log((0..100).map(|n| n.to_string())));
        assert!(many.starts_with("20\n") && many.ends_with("99\n"), "{many}");
        let long = last_lines(&log((0..80).map(|_| "é".repeat(50))));
        assert!(long.len() <= LOG_BYTES && long.len() > LOG_BYTES - 3);
        let parts = b"t stdout P one \nt stdout F line\nt stderr F two\n";
        assert_eq!(last_lines(parts), "one line\ntwo\n");
    }

    #[test]
    fn what_a_container_wrote_beats_its_log() {
        let root = tempfile::tempdir().unwrap();
        let file = prepare(root.path(), "c").unwrap();
        let log_file = root.path().join("log");
        fs::write(&log_file, log(["from the log".to_owned()].into_iter())).unwrap();
        assert_eq!(message(root.path(), "c", None), "");
        assert_eq!(message(root.path(), "c", Some(&log_file)), "from the log\n");
        fs::write(&file, "x".repeat(5000) + "end").unwrap();
        let own = message(root.path(), "c", Some(&log_file));
        assert!(own.len() == MESSAGE_BYTES && own.ends_with("end"));
        remove(root.path(), "c");
        assert_eq!(message(root.path(), "c", None), "");
    }
}
