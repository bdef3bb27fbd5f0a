//! The ledger's file: an append-only journal, one checked line per entry.
//!
//! Taking an address is one appended line and one `fdatasync`, before anything is touched; giving it back is one
//! appended line. A process that is killed can leave at most an unfinished last line, which the next one cuts off. After a
//! power cut the boot id differs, so nothing that the journal says of attachments holds any more; lines that the disk lost
//! or mangled then do no harm.
//!
//! ```text
//! <16 hex digits: FNV-1a of the rest>  <JSON of the entry>\n
//! ```

use std::fs::{self, File, OpenOptions};
use std::io::{self, Read, Seek, SeekFrom, Write};
use std::os::unix::fs::{DirBuilderExt, OpenOptionsExt};
use std::path::{Path, PathBuf};
use std::sync::mpsc;
use std::time::Duration;

use nix::errno::Errno;
use nix::fcntl::{Flock, FlockArg};

use crate::ledger::{Entry, Ledger};
use crate::names::fnv1a;

/// A journal shorter than this is never rewritten.
const REWRITE_ABOVE: u64 = 256 * 1024;

/// Why the journal could not be used.
#[derive(Debug, thiserror::Error)]
pub enum JournalError {
    /// Someone else held the lock for too long.
    #[error("another call held {path} for more than {limit:?}")]
    Busy {
        /// The lock file.
        path: PathBuf,
        /// How long was waited.
        limit: Duration,
    },
    /// The system refused.
    #[error("cannot {step} {path}")]
    Io {
        /// What was being done.
        step: &'static str,
        /// The file.
        path: PathBuf,
        /// Why.
        #[source]
        source: io::Error,
    },
}

/// The journal of one network, locked against all other processes.
#[derive(Debug)]
pub struct Journal {
    file: File,
    path: PathBuf,
    ledger: Ledger,
    length: u64,
    _lock: Flock<File>,
}

impl Journal {
    /// Waits for the lock and reads everything; the folder is made if missing.
    ///
    /// # Errors
    /// [`JournalError::Busy`] after `limit`, or what the system refused.
    pub fn open(folder: &Path, limit: Duration) -> Result<Self, JournalError> {
        let lock_path = folder.join("lock");
        let lock_file = match open_file(&lock_path) {
            Err(e) if e.kind() == io::ErrorKind::NotFound => {
                let mut builder = fs::DirBuilder::new();
                let made = builder.recursive(true).mode(0o700).create(folder);
                made.map_err(failed("make the folder", folder))?;
                open_file(&lock_path)
            }
            other => other,
        };
        let lock_file = lock_file.map_err(failed("open", &lock_path))?;
        let lock = lock(lock_file, &lock_path, limit)?;
        let path = folder.join("journal");
        let mut file = open_file(&path).map_err(failed("open", &path))?;
        let mut text = Vec::new();
        file.read_to_end(&mut text).map_err(failed("read", &path))?;
        let Contents { ledger, end: length, damaged } = read(&text);
        if length < text.len() as u64 {
            file.set_len(length).map_err(failed("cut the unfinished end off", &path))?;
        }
        let mut journal = Self { file, path, ledger, length, _lock: lock };
        if damaged > 0 {
            journal.drop_damage(damaged)?;
        }
        journal.shorten()?;
        Ok(journal)
    }

    /// What the entries add up to.
    #[must_use]
    pub fn ledger(&self) -> &Ledger {
        &self.ledger
    }

    /// Appends entries: all or, when the disk is full, none.
    ///
    /// # Errors
    /// What the system refused; nothing has changed then.
    pub fn append(&mut self, entries: Vec<Entry>) -> Result<(), JournalError> {
        let text = lines(&entries).map_err(failed("write", &self.path))?;
        let written =
            self.file.seek(SeekFrom::Start(self.length)).and_then(|_| self.file.write_all(&text));
        if let Err(source) = written {
            // If this fails, too, the next reader cuts the unfinished line off.
            self.file.set_len(self.length).ok();
            return Err(failed("write", &self.path)(source));
        }
        self.length += text.len() as u64;
        entries.into_iter().for_each(|entry| self.ledger.apply(entry));
        Ok(())
    }

    /// Lets others in, then waits until all appended entries are on the disk.
    ///
    /// # Errors
    /// When the disk does not take them.
    pub fn unlock_and_sync(self) -> Result<(), JournalError> {
        let Self { file, path, _lock: lock, .. } = self;
        drop(lock);
        file.sync_data().map_err(failed("write", &path))
    }

    /// Rewrites a journal that is mostly history.
    fn shorten(&mut self) -> Result<(), JournalError> {
        if self.length < REWRITE_ABOVE {
            return Ok(());
        }
        let text = lines(&self.ledger.entries()).map_err(failed("rewrite", &self.path))?;
        if (text.len() as u64) * 4 > self.length {
            return Ok(());
        }
        self.rewrite(&text)
    }

    /// Says once what was lost. Addresses whose line was lost are still not given to others while a route leads to them
    /// (`wire::in_use`).
    fn drop_damage(&mut self, lines_lost: usize) -> Result<(), JournalError> {
        drop(writeln!(
            io::stderr(),
            "warning: {} had {lines_lost} damaged line(s), which are lost: is the disk in order?",
            self.path.display()
        ));
        let text = lines(&self.ledger.entries()).map_err(failed("rewrite", &self.path))?;
        self.rewrite(&text)
    }

    fn rewrite(&mut self, text: &[u8]) -> Result<(), JournalError> {
        keelson_durable::write(&self.path, text, 0o600)
            .map_err(|e| failed("rewrite", &self.path)(io::Error::other(e)))?;
        self.file = open_file(&self.path).map_err(failed("open", &self.path))?;
        self.length = text.len() as u64;
        Ok(())
    }
}

fn failed<'a>(step: &'static str, path: &'a Path) -> impl Fn(io::Error) -> JournalError + 'a {
    move |source| JournalError::Io { step, path: path.to_owned(), source }
}

fn open_file(path: &Path) -> io::Result<File> {
    OpenOptions::new().read(true).write(true).create(true).truncate(false).mode(0o600).open(path)
}

/// What a journal's text says.
pub(crate) struct Contents {
    pub(crate) ledger: Ledger,
    /// Where the last finished line ends.
    pub(crate) end: u64,
    /// So many finished lines cannot be read.
    pub(crate) damaged: usize,
}

/// Adds up the good lines.
pub(crate) fn read(text: &[u8]) -> Contents {
    let mut found = Contents { ledger: Ledger::default(), end: 0, damaged: 0 };
    for line in text.split_inclusive(|byte| *byte == b'\n') {
        let Some(finished) = line.strip_suffix(b"\n") else { break };
        found.end += line.len() as u64;
        match parse(finished) {
            Some(entry) => found.ledger.apply(entry),
            None => found.damaged += 1,
        }
    }
    found
}

fn parse(line: &[u8]) -> Option<Entry> {
    let (sum, rest) = line.split_at_checked(16)?;
    let json = rest.strip_prefix(b" ")?;
    let sum = u64::from_str_radix(std::str::from_utf8(sum).ok()?, 16).ok()?;
    (sum == fnv1a(json)).then(|| serde_json::from_slice(json).ok()).flatten()
}

pub(crate) fn lines(entries: &[Entry]) -> io::Result<Vec<u8>> {
    let mut text = Vec::new();
    for entry in entries {
        let json = serde_json::to_vec(entry)?;
        write!(text, "{:016x} ", fnv1a(&json))?;
        text.extend(json);
        text.push(b'\n');
    }
    Ok(text)
}

/// `flock` knows no time limit: when the lock is taken, a thread waits for it and we wait for the thread. A thread that
/// gets the lock too late finds nobody to give it to and so releases it.
fn lock(file: File, path: &Path, limit: Duration) -> Result<Flock<File>, JournalError> {
    let file = match Flock::lock(file, FlockArg::LockExclusiveNonblock) {
        Ok(lock) => return Ok(lock),
        Err((file, Errno::EWOULDBLOCK)) => file,
        Err((_, errno)) => return Err(failed("lock", path)(errno.into())),
    };
    let (sender, receiver) = mpsc::sync_channel(1);
    let waiter = move || drop(sender.send(Flock::lock(file, FlockArg::LockExclusive)));
    std::thread::Builder::new().spawn(waiter).map_err(failed("wait for", path))?;
    match receiver.recv_timeout(limit) {
        Ok(Ok(lock)) => Ok(lock),
        Ok(Err((_, errno))) => Err(failed("lock", path)(errno.into())),
        Err(_) => Err(JournalError::Busy { path: path.to_owned(), limit }),
    }
}

#[cfg(test)]
mod tests;
