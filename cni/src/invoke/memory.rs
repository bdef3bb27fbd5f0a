//! What is kept about an attachment from ADD until DEL, one file each.

use std::fs::{self, OpenOptions};
use std::io::{self, Write};
use std::os::unix::fs::{DirBuilderExt, OpenOptionsExt};
use std::path::{Path, PathBuf};

use nix::fcntl::OFlag;
use serde::{Deserialize, Serialize};
use serde_json::Value;

use super::{Attachment, InvokeError};
use crate::conflist::Conflist;

/// What DEL needs of its ADD.
#[derive(Debug, Serialize, Deserialize)]
pub(super) struct Remembered {
    pub(super) attachment: Attachment,
    pub(super) network: String,
    pub(super) list: Value,
    pub(super) result: Value,
}

/// The state folder.
#[derive(Debug, Clone, Copy)]
pub(super) struct Memory<'a> {
    pub(super) folder: &'a Path,
}

impl Memory<'_> {
    pub(super) fn file(self, network: &str, attachment: &Attachment) -> PathBuf {
        let Attachment { container_id, ifname, .. } = attachment;
        self.folder.join(format!("{network}-{container_id}-{ifname}.json"))
    }

    /// Replaces the file in one step, but does not wait for the disk: attachments do not survive a reboot, either.
    pub(super) fn remember(
        self,
        list: &Conflist,
        attachment: &Attachment,
        result: &Value,
    ) -> Result<(), InvokeError> {
        let path = self.file(&list.name, attachment);
        let remembered = Remembered {
            attachment: attachment.clone(),
            network: list.name.clone(),
            list: list.source.clone(),
            result: result.clone(),
        };
        let temp = path.with_extension("tmp");
        let fail = |source| InvokeError::State { step: "write", path: path.clone(), source };
        // Configurations may hold secrets of other plugins.
        fs::DirBuilder::new().recursive(true).mode(0o700).create(self.folder).map_err(fail)?;
        let text = serde_json::to_vec(&remembered).map_err(|e| fail(e.into()))?;
        let mut options = OpenOptions::new();
        options.write(true).create(true).truncate(true).mode(0o600);
        options.custom_flags(OFlag::O_NOFOLLOW.bits());
        options.open(&temp).and_then(|mut file| file.write_all(&text)).map_err(fail)?;
        fs::rename(&temp, &path).map_err(fail)
    }

    pub(super) fn recall(file: &Path) -> Result<Option<Remembered>, InvokeError> {
        match fs::read(file) {
            // A file that does not parse is from another program or a power cut: as good as none.
            Ok(text) => Ok(serde_json::from_slice(&text).ok()),
            Err(e) if e.kind() == io::ErrorKind::NotFound => Ok(None),
            Err(source) => Err(InvokeError::State { step: "read", path: file.to_owned(), source }),
        }
    }

    pub(super) fn forget(file: &Path) -> Result<(), InvokeError> {
        match fs::remove_file(file) {
            Err(source) if source.kind() != io::ErrorKind::NotFound => {
                Err(InvokeError::State { step: "remove", path: file.to_owned(), source })
            }
            _ => Ok(()),
        }
    }

    /// The files of a container's attachments.
    pub(super) fn of_container(self, container_id: &str) -> Result<Vec<PathBuf>, InvokeError> {
        let inside = format!("-{container_id}-");
        let files = self.files()?.into_iter();
        Ok(files
            .filter(|file| file.file_stem().is_some_and(|n| n.to_string_lossy().contains(&inside)))
            .collect())
    }

    pub(super) fn all(self) -> Result<Vec<Remembered>, InvokeError> {
        let mut all = Vec::new();
        for file in self.files()? {
            all.extend(Self::recall(&file)?);
        }
        Ok(all)
    }

    fn files(self) -> Result<Vec<PathBuf>, InvokeError> {
        let fail =
            |source| InvokeError::State { step: "list", path: self.folder.to_owned(), source };
        let entries = match fs::read_dir(self.folder) {
            Err(e) if e.kind() == io::ErrorKind::NotFound => return Ok(Vec::new()),
            entries => entries.map_err(fail)?,
        };
        let mut files = Vec::new();
        for entry in entries {
            let path = entry.map_err(fail)?.path();
            if path.extension().is_some_and(|extension| extension == "json") {
                files.push(path);
            }
        }
        Ok(files)
    }
}
