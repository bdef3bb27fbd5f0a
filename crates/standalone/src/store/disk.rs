//! The disk side of the store: a redb file.

use std::io;
use std::path::{Path, PathBuf};

use redb::{Database, ReadableDatabase, ReadableTable, TableDefinition};
use serde_json::Value;

use super::state::State;
use crate::kinds::{self, Kind};
use crate::object::Object;

/// `group/plural/` + the object's key -> JSON.
const OBJECTS: TableDefinition<'_, &str, &[u8]> = TableDefinition::new("objects");
/// `group/plural` -> revision of the kind's last change, so that a restart ends no idle watch.
const CHANGED: TableDefinition<'_, &str, u64> = TableDefinition::new("changed");
const META: TableDefinition<'_, &str, u64> = TableDefinition::new("meta");

const FORMAT_KEY: &str = "format";
const REVISION_KEY: &str = "revision";
/// Grows when an older program could not read the file any more.
const FORMAT: u64 = 1;
/// redb keeps pages in memory; the objects are in memory anyway.
const CACHE_BYTES: usize = 8 << 20;

/// Why the store cannot be opened, read or written.
#[derive(Debug, thiserror::Error)]
pub enum StoreError {
    /// Another process has it open.
    #[error(
        "{path} is in use by another process: stop that one first, or use another data directory"
    )]
    InUse {
        /// The store's file.
        path: PathBuf,
    },
    /// It is no store of ours, or damaged.
    #[error(
        "{path} is not a keelson store or is damaged ({why}): restore it from a backup, or move it away to start with an empty cluster"
    )]
    Foreign {
        /// The store's file.
        path: PathBuf,
        /// What was found.
        why: String,
    },
    /// A newer program wrote it.
    #[error("{path} has format {found}, this program knows {FORMAT}: use the newer program")]
    Newer {
        /// The store's file.
        path: PathBuf,
        /// Its format.
        found: u64,
    },
    /// The operating system refuses.
    #[error("{path}: {why}")]
    Io {
        /// The store's file.
        path: PathBuf,
        /// What it said.
        why: String,
        /// Whether there is no space left.
        full: bool,
    },
    /// No thread could be started.
    #[error("cannot start the store's thread")]
    Thread {
        /// Why not.
        #[source]
        source: io::Error,
    },
}

impl StoreError {
    /// Whether the disk is full.
    #[must_use]
    pub fn is_full(&self) -> bool {
        matches!(self, Self::Io { full: true, .. })
    }
}

/// One line of a commit.
pub(super) struct Record<'a> {
    pub(super) kind: &'static Kind,
    pub(super) key: String,
    pub(super) revision: u64,
    pub(super) json: Option<&'a [u8]>,
}

#[derive(Debug)]
pub(super) struct Disk {
    path: PathBuf,
    /// None after a failed commit: redb wants to be opened anew then.
    database: Option<Database>,
}

impl Disk {
    pub(super) fn open(path: &Path) -> Result<Self, StoreError> {
        let mut disk = Self { path: path.to_owned(), database: None };
        if !path.exists() {
            disk.create()?;
        }
        disk.database()?;
        Ok(disk)
    }

    /// Makes an empty store under another name first: a crash leaves no half-made file behind.
    fn create(&self) -> Result<(), StoreError> {
        let fresh = self.path.with_extension("new");
        drop(std::fs::remove_file(&fresh));
        let made = (|| -> Result<(), redb::Error> {
            let database = Database::builder().set_cache_size(CACHE_BYTES).create(&fresh)?;
            let write = database.begin_write()?;
            write.open_table(OBJECTS)?;
            write.open_table(CHANGED)?;
            let mut meta = write.open_table(META)?;
            meta.insert(FORMAT_KEY, FORMAT)?;
            meta.insert(REVISION_KEY, 1)?;
            drop(meta);
            write.commit()?;
            Ok(())
        })();
        made.map_err(|e| self.error(e))?;
        std::fs::rename(&fresh, &self.path).map_err(|e| self.error(e.into()))?;
        keelson_durable::sync_parent(&self.path).map_err(|e| self.error(e.source.into()))
    }

    fn database(&mut self) -> Result<&Database, StoreError> {
        if self.database.is_none() {
            let opened = Database::builder().set_cache_size(CACHE_BYTES).open(&self.path);
            let database = opened.map_err(|e| self.error(e.into()))?;
            let format = meta(&database, FORMAT_KEY).map_err(|e| self.error(e))?;
            match format {
                Some(FORMAT) => {}
                Some(found) => {
                    return Err(StoreError::Newer { path: self.path.clone(), found });
                }
                None => return Err(self.foreign("it holds no format number")),
            }
            self.database = Some(database);
        }
        self.database.as_ref().ok_or_else(|| self.foreign("it is closed"))
    }

    pub(super) fn revision(&mut self) -> Result<u64, StoreError> {
        let read = meta(self.database()?, REVISION_KEY);
        match read {
            Ok(Some(revision)) => Ok(revision),
            Ok(None) => Err(self.foreign("it holds no revision")),
            Err(error) => {
                self.database = None;
                Err(self.error(error))
            }
        }
    }

    pub(super) fn load(&mut self) -> Result<State, StoreError> {
        let mut state = State::new(self.revision()?);
        let loaded = load_into(self.database()?, &mut state);
        match loaded {
            Ok(Ok(())) => Ok(state),
            Ok(Err(why)) => Err(self.foreign(&why)),
            Err(error) => Err(self.error(error)),
        }
    }

    /// Writes all records, or none. After an error it is unknown which; [`Self::revision`] tells.
    pub(super) fn commit(&mut self, records: &[Record<'_>]) -> Result<(), StoreError> {
        let done = write(self.database()?, records);
        done.map_err(|error| {
            self.database = None;
            self.error(error)
        })
    }

    fn foreign(&self, why: &str) -> StoreError {
        StoreError::Foreign { path: self.path.clone(), why: why.to_owned() }
    }

    fn error(&self, error: redb::Error) -> StoreError {
        let path = self.path.clone();
        match error {
            redb::Error::DatabaseAlreadyOpen => StoreError::InUse { path },
            redb::Error::Io(e) if e.kind() == io::ErrorKind::InvalidData => {
                StoreError::Foreign { path, why: e.to_string() }
            }
            redb::Error::Io(e) => {
                let full = matches!(
                    e.kind(),
                    io::ErrorKind::StorageFull
                        | io::ErrorKind::QuotaExceeded
                        | io::ErrorKind::FileTooLarge
                );
                StoreError::Io { path, why: e.to_string(), full }
            }
            other => StoreError::Foreign { path, why: other.to_string() },
        }
    }
}

fn meta(database: &Database, key: &str) -> Result<Option<u64>, redb::Error> {
    let read = database.begin_read()?;
    let table = match read.open_table(META) {
        Ok(table) => table,
        Err(redb::TableError::TableDoesNotExist(_)) => return Ok(None),
        Err(error) => return Err(error.into()),
    };
    Ok(table.get(key)?.map(|value| value.value()))
}

fn load_into(database: &Database, state: &mut State) -> Result<Result<(), String>, redb::Error> {
    let read = database.begin_read()?;
    for entry in read.open_table(CHANGED)?.iter()? {
        let (name, revision) = entry?;
        if let Some(kind) = kinds::all().iter().find(|k| prefix(k) == name.value()) {
            state.restore_last_change(kind, revision.value());
        }
    }
    for entry in read.open_table(OBJECTS)?.iter()? {
        let (key, json) = entry?;
        // A kind that this program does not know is kept on the disk and not shown.
        let Some(kind) = kinds::all().iter().copied().find(|k| has_prefix(k, key.value())) else {
            tracing::warn!(key = key.value(), "An object of an unknown kind is in the store");
            continue;
        };
        let Ok(value) = serde_json::from_slice::<Value>(json.value()) else {
            return Ok(Err(format!("the object {} is not JSON", key.value())));
        };
        let revision = value["metadata"]["resourceVersion"].as_str().and_then(|r| r.parse().ok());
        let Some(revision) = revision else {
            return Ok(Err(format!("the object {} has no resourceVersion", key.value())));
        };
        state.restore(Object::new(kind, revision, &value));
    }
    Ok(Ok(()))
}

fn write(database: &Database, records: &[Record<'_>]) -> Result<(), redb::Error> {
    let write = database.begin_write()?;
    {
        let mut objects = write.open_table(OBJECTS)?;
        let mut changed = write.open_table(CHANGED)?;
        let mut meta = write.open_table(META)?;
        for record in records {
            let prefix = prefix(record.kind);
            let key = format!("{prefix}/{}", record.key);
            match record.json {
                Some(json) => drop(objects.insert(key.as_str(), json)?),
                None => drop(objects.remove(key.as_str())?),
            }
            changed.insert(prefix.as_str(), record.revision)?;
            meta.insert(REVISION_KEY, record.revision)?;
        }
    }
    write.commit()?;
    Ok(())
}

/// Groups hold no slash, so prefixes cannot be prefixes of each other.
fn prefix(kind: &Kind) -> String {
    format!("{}/{}", kind.group, kind.plural)
}

fn has_prefix(kind: &Kind, key: &str) -> bool {
    key.strip_prefix(&prefix(kind)).is_some_and(|rest| rest.starts_with('/'))
}
