//! The programs: loaded once, then kept in the kernel by their pins, also over restarts.

use std::collections::HashMap;
use std::fs;
use std::io;
use std::os::fd::{AsFd, OwnedFd};
use std::path::{Path, PathBuf};

use aya::EbpfLoader;
use aya::programs::{Program, ProgramError};
use keelson_ebpf_abi::VERSION;
use keelson_ebpf_objects::{PACKET, SOCKET};
use sha2::{Digest, Sha256};

use super::error::EbpfError;
use super::sys;
use crate::switch::with_sources;

/// A file of programs.
struct Object {
    name: &'static str,
    bytes: &'static [u8],
    /// Constants that switch something on that not every kernel has, and what is said without it.
    switches: &'static [(&'static str, &'static str)],
}

const OBJECTS: &[Object] = &[
    Object {
        name: "socket",
        bytes: SOCKET,
        switches: &[(
            "HAS_SET_RETVAL",
            "Calls to Services without endpoints are refused by packets: this kernel has no bpf_set_retval for sockets",
        )],
    },
    Object { name: "packet", bytes: PACKET, switches: &[] },
];

impl Object {
    fn refused(&self, source: impl std::error::Error + Send + Sync + 'static) -> EbpfError {
        EbpfError::Load { object: self.name, source: Box::new(source) }
    }

    /// Its maps, apart from constants. Those of one name in several objects are one map.
    fn maps(&self) -> Result<Vec<String>, EbpfError> {
        let parsed = aya_obj::Object::parse(self.bytes).map_err(|e| self.refused(e))?;
        Ok(parsed.maps.into_keys().filter(|name| !name.starts_with('.')).collect())
    }
}

/// Programs in the kernel, by name.
pub(crate) struct Programs {
    by_name: HashMap<String, OwnedFd>,
    /// Loaded just now, not by an earlier process.
    pub(crate) fresh: bool,
}

impl Programs {
    /// Where the maps of this version are pinned.
    pub(crate) fn maps_folder(pins: &Path) -> PathBuf {
        pins.join(format!("maps-v{VERSION}"))
    }

    /// Takes over the programs that an earlier process of this version left, or loads them. Makes the maps
    /// that are missing.
    pub(crate) fn ready(pins: &Path) -> Result<Self, EbpfError> {
        if let Some(found) = Self::found(pins)? {
            return Ok(found);
        }
        let maps = Self::maps_folder(pins);
        let by_name = load(&maps)?;
        let missing =
            || EbpfError::Pin { path: maps.clone(), source: io::ErrorKind::NotFound.into() };
        let folder = pins.join(stamp(&maps)?.ok_or_else(missing)?);
        keep(&by_name, &folder)?;
        remove_others(pins, &folder);
        Ok(Programs { by_name, fresh: true })
    }

    /// The programs that an earlier process of this version left.
    pub(crate) fn found(pins: &Path) -> Result<Option<Self>, EbpfError> {
        let stamp = stamp(&Self::maps_folder(pins))?;
        let by_name = stamp.and_then(|stamp| pinned(&pins.join(stamp)));
        Ok(by_name.map(|by_name| Programs { by_name, fresh: false }))
    }

    pub(crate) fn get(&self, name: &str) -> Option<&OwnedFd> {
        self.by_name.get(name)
    }
}

/// Loads the programs for a trial: the kernel's verifier sees them, and nothing stays.
pub(crate) fn try_load() -> Result<(), EbpfError> {
    OBJECTS.iter().try_for_each(|object| load_object(object, None, &mut HashMap::new()))
}

/// Name of the folder of programs: another one for other programs or other maps. Nothing when a map is missing.
fn stamp(maps: &Path) -> Result<Option<String>, EbpfError> {
    let mut hash = Sha256::new();
    for object in OBJECTS {
        hash.update(object.bytes);
        let mut names = object.maps()?;
        names.sort();
        for name in names {
            let info =
                sys::open_pinned(&maps.join(name)).and_then(|map| sys::map_info(map.as_fd()));
            let Ok(info) = info else { return Ok(None) };
            hash.update(info.id.to_ne_bytes());
        }
    }
    let hash: String = hash.finalize().iter().take(8).map(|byte| format!("{byte:02x}")).collect();
    Ok(Some(format!("programs-v{VERSION}-{hash}")))
}

/// The programs in that folder, which has all or none.
fn pinned(folder: &Path) -> Option<HashMap<String, OwnedFd>> {
    let entries = fs::read_dir(folder).ok()?.flatten();
    entries
        .map(|entry| {
            let name = entry.file_name().into_string().ok()?;
            Some((name, sys::open_pinned(&entry.path()).ok()?))
        })
        .collect()
}

fn load(maps: &Path) -> Result<HashMap<String, OwnedFd>, EbpfError> {
    let fail = |source| EbpfError::Pin { path: maps.to_owned(), source };
    fs::create_dir_all(maps).map_err(fail)?;
    let mut by_name = HashMap::new();
    OBJECTS.iter().try_for_each(|object| load_object(object, Some(maps), &mut by_name))?;
    Ok(by_name)
}

/// Loads an object with what this kernel has.
fn load_object(
    object: &'static Object,
    maps: Option<&Path>,
    by_name: &mut HashMap<String, OwnedFd>,
) -> Result<(), EbpfError> {
    for (switch, lacking) in object.switches {
        match load_with(object, maps, &[(switch, 1)]) {
            Ok(programs) => {
                by_name.extend(programs);
                return Ok(());
            }
            Err(error) => tracing::info!(error = with_sources(&error), "{lacking}"),
        }
    }
    by_name.extend(load_with(object, maps, &[])?);
    Ok(())
}

fn load_with(
    object: &'static Object,
    maps: Option<&Path>,
    switches: &[(&str, u8)],
) -> Result<Vec<(String, OwnedFd)>, EbpfError> {
    let names = object.maps()?;
    let mut loader = EbpfLoader::new();
    for (name, folder) in names.iter().flat_map(|name| maps.map(|maps| (name, maps))) {
        loader.map_pin_path(name, folder.join(name));
    }
    for (name, value) in switches {
        loader.override_global(name, value, true);
    }
    let mut loaded = loader.load(object.bytes).map_err(|e| object.refused(e))?;
    let programs = loaded.programs_mut().map(|(name, program)| {
        let verify =
            |source| EbpfError::Verify { program: name.to_owned(), source: Box::new(source) };
        Ok((name.to_owned(), verified(program).map_err(verify)?))
    });
    programs.collect()
}

/// Hands a program to the kernel.
fn verified(program: &mut Program) -> Result<OwnedFd, ProgramError> {
    let fd = match program {
        Program::CgroupSockAddr(program) => {
            program.load()?;
            program.fd()?.as_fd().try_clone_to_owned()
        }
        Program::CgroupSock(program) => {
            program.load()?;
            program.fd()?.as_fd().try_clone_to_owned()
        }
        Program::SchedClassifier(program) => {
            program.load()?;
            program.fd()?.as_fd().try_clone_to_owned()
        }
        _ => return Err(ProgramError::UnexpectedProgramType),
    };
    fd.map_err(ProgramError::IOError)
}

/// Pins programs, in a folder that has them all or does not exist.
fn keep(by_name: &HashMap<String, OwnedFd>, folder: &Path) -> Result<(), EbpfError> {
    // A BPF file system knows no dots in names.
    let beside = PathBuf::from(format!("{}-new", folder.display()));
    let fail = |source| EbpfError::Pin { path: folder.to_owned(), source };
    remove(&beside).and_then(|()| fs::create_dir(&beside)).map_err(fail)?;
    for (name, program) in by_name {
        sys::pin(program.as_fd(), &beside.join(name)).map_err(fail)?;
    }
    remove(folder).and_then(|()| fs::rename(&beside, folder)).map_err(fail)
}

/// Forgets the programs of other versions. Those that are attached stay until they are replaced.
fn remove_others(pins: &Path, folder: &Path) {
    let entries = fs::read_dir(pins).into_iter().flatten().flatten();
    for path in entries.map(|entry| entry.path()).filter(|path| path != folder) {
        let name = path.file_name().unwrap_or_default().to_string_lossy();
        if name.starts_with("programs-")
            && let Err(error) = remove(&path)
        {
            tracing::warn!(path = %path.display(), %error, "Cannot remove programs of another version");
        }
    }
}

/// Removes a folder of pins; its absence is fine.
pub(crate) fn remove(folder: &Path) -> io::Result<()> {
    match fs::remove_dir_all(folder) {
        Err(error) if error.kind() == io::ErrorKind::NotFound => Ok(()),
        result => result,
    }
}
