//! The programs: loaded once, then kept in the kernel by their pins, also over restarts.

use std::collections::HashMap;
use std::fs;
use std::io;
use std::os::fd::{AsFd, OwnedFd};
use std::path::{Path, PathBuf};
use std::sync::OnceLock;

use aya::EbpfLoader;
use aya::programs::{Program, ProgramError};
use keelson_ebpf_abi::VERSION;
use keelson_ebpf_objects::{PACKET, SOCKET, XDP};
use sha2::{Digest, Sha256};

use super::config::EbpfConfig;
use super::error::EbpfError;
use super::moving::{self, Moving, Shapes};
use super::needs;
use super::sizes::{Bounds, Needs};
use super::sys::{self, MapInfo};

/// A file of programs.
struct Object {
    name: &'static str,
    bytes: &'static [u8],
    switches: &'static [Switch],
    /// Its maps, once somebody has asked for them.
    maps: OnceLock<Shapes>,
}

/// A constant that switches something on that not every kernel has.
struct Switch {
    name: &'static str,
    is_there: fn() -> bool,
    /// What is said without it.
    lacking: &'static str,
}

static OBJECTS: [Object; 3] = [
    Object {
        name: "socket",
        bytes: SOCKET,
        switches: &[Switch {
            name: "HAS_SET_RETVAL",
            is_there: needs::has_set_retval,
            lacking: "Calls to Services without endpoints are refused by packets: this kernel has no bpf_set_retval for sockets",
        }],
        maps: OnceLock::new(),
    },
    Object { name: "packet", bytes: PACKET, switches: &[], maps: OnceLock::new() },
    Object { name: "xdp", bytes: XDP, switches: &[], maps: OnceLock::new() },
];

impl Object {
    fn refused(&self, source: impl std::error::Error + Send + Sync + 'static) -> EbpfError {
        EbpfError::Load { object: self.name, source: Box::new(source) }
    }

    /// Its maps, apart from constants. Those of one name in several objects are one map.
    fn maps(&self) -> Result<&Shapes, EbpfError> {
        if let Some(maps) = self.maps.get() {
            return Ok(maps);
        }
        let parsed = aya_obj::Object::parse(self.bytes).map_err(|e| self.refused(e))?;
        let shape = |map: &aya_obj::Map| MapInfo {
            kind: map.map_type(),
            key_size: map.key_size(),
            value_size: map.value_size(),
            max_entries: map.max_entries(),
            ..MapInfo::default()
        };
        let maps = parsed.maps.iter().filter(|(name, _)| !name.starts_with('.'));
        let maps = maps.map(|(name, map)| (name.clone(), shape(map))).collect();
        Ok(self.maps.get_or_init(|| maps))
    }
}

/// Programs in the kernel, by name.
pub(crate) struct Programs {
    by_name: HashMap<String, OwnedFd>,
    /// Loaded just now, not by an earlier process.
    pub(crate) fresh: bool,
    /// By the monotonic clock: what was in their maps' place was copied to the last element after that.
    pub(crate) copied_ns: u64,
}

impl Programs {
    /// Where the maps of this version are pinned.
    pub(crate) fn maps_folder(pins: &Path) -> PathBuf {
        moving::maps_folder(pins)
    }

    /// Takes over the programs that an earlier process of this version left, or loads them. Makes the maps that are
    /// missing, and moves what is in those that are too small or of another version. The programs must be attached
    /// then, and [`moving::settle`] called.
    pub(crate) fn ready(config: &EbpfConfig, needs: &Needs) -> Result<Self, EbpfError> {
        let pins = &config.pins;
        let (moving, shapes) = plan(config, needs)?;
        let found = Self::found(pins)?;
        if !moving.is_needed()
            && let Some(found) = found
        {
            return Ok(found);
        }
        moving.begin()?;
        let by_name = load(&shapes, |name| moving.home(name))?;
        let copied_ns = moving.finish()?;
        let maps = Self::maps_folder(pins);
        let missing =
            || EbpfError::Pin { path: maps.clone(), source: io::ErrorKind::NotFound.into() };
        let folder = pins.join(stamp(&maps)?.ok_or_else(missing)?);
        keep(&by_name, &folder)?;
        remove_others(pins, &folder);
        Ok(Programs { by_name, fresh: true, copied_ns })
    }

    /// The programs that an earlier process of this version left.
    pub(crate) fn found(pins: &Path) -> Result<Option<Self>, EbpfError> {
        let stamp = stamp(&Self::maps_folder(pins))?;
        let by_name = stamp.and_then(|stamp| pinned(&pins.join(stamp)));
        Ok(by_name.map(|by_name| Programs { by_name, fresh: false, copied_ns: 0 }))
    }

    pub(crate) fn get(&self, name: &str) -> Option<&OwnedFd> {
        self.by_name.get(name)
    }
}

/// Loads the programs for a trial: the kernel's verifier sees them, and nothing stays.
pub(crate) fn try_load() -> Result<Programs, EbpfError> {
    let (config, needs) = (EbpfConfig::default(), Needs::default());
    let sized = sizing(&config, &needs)?;
    let load = |object| {
        let maps = Object::maps(object)?.iter().map(|(name, shape)| Place {
            name,
            max_entries: sized(name, shape, None),
            path: None,
        });
        load_object(object, &maps.collect::<Vec<_>>())
    };
    let mut by_name = HashMap::new();
    for object in &OBJECTS {
        by_name.extend(load(object)?);
    }
    Ok(Programs { by_name, fresh: true, copied_ns: 0 })
}

/// How large a map shall be that its object describes like that, and of which this is there.
fn sizing(
    config: &EbpfConfig,
    needs: &Needs,
) -> Result<impl Fn(&str, &MapInfo, Option<&MapInfo>) -> u32, EbpfError> {
    let cpus = sys::cpus()?;
    Ok(move |name: &str, shape: &MapInfo, found: Option<&MapInfo>| {
        let bounds = Bounds::of(name, config, cpus);
        let found = found.map(|found| found.max_entries);
        bounds.map_or(shape.max_entries, |bounds| bounds.size(found, needs.of(name)))
    })
}

/// What has to move, and how the maps shall be.
fn plan(config: &EbpfConfig, needs: &Needs) -> Result<(Moving, Shapes), EbpfError> {
    let mut all = Shapes::new();
    for object in &OBJECTS {
        all.extend(object.maps()?.clone());
    }
    let sized = sizing(config, needs)?;
    Moving::plan(&config.pins, all, sized)
}

/// Name of the folder of programs: another one for other programs or other maps. Nothing when a map is missing.
fn stamp(maps: &Path) -> Result<Option<String>, EbpfError> {
    // Connections may wait for this.
    static PROGRAMS: OnceLock<Sha256> = OnceLock::new();
    let programs = || OBJECTS.iter().fold(Sha256::new(), |hash, o| hash.chain_update(o.bytes));
    let mut hash = PROGRAMS.get_or_init(programs).clone();
    for object in &OBJECTS {
        for name in object.maps()?.keys() {
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

fn load(
    shapes: &Shapes,
    home: impl Fn(&str) -> PathBuf,
) -> Result<HashMap<String, OwnedFd>, EbpfError> {
    let mut by_name = HashMap::new();
    for object in &OBJECTS {
        let maps = object.maps()?.iter().map(|(name, shape)| Place {
            name,
            max_entries: shapes.get(name).unwrap_or(shape).max_entries,
            path: Some(home(name)),
        });
        by_name.extend(load_object(object, &maps.collect::<Vec<_>>())?);
    }
    Ok(by_name)
}

/// A map as the loader shall make it, or take it if it is there.
struct Place<'n> {
    name: &'n str,
    max_entries: u32,
    path: Option<PathBuf>,
}

/// Loads an object with what this kernel has.
fn load_object(
    object: &'static Object,
    maps: &[Place<'_>],
) -> Result<Vec<(String, OwnedFd)>, EbpfError> {
    let mut switches = Vec::new();
    for switch in object.switches {
        if (switch.is_there)() {
            switches.push((switch.name, 1));
        } else {
            tracing::info!("{}", switch.lacking);
        }
    }
    load_with(object, maps, &switches)
}

fn load_with(
    object: &'static Object,
    maps: &[Place<'_>],
    switches: &[(&str, u8)],
) -> Result<Vec<(String, OwnedFd)>, EbpfError> {
    let mut loader = EbpfLoader::new();
    for Place { name, max_entries, path } in maps {
        loader.map_max_entries(name, *max_entries);
        path.as_ref().map(|path| loader.map_pin_path(name, path));
    }
    for (name, value) in switches {
        loader.override_global(name, value, true);
    }
    let loaded = keelson_ebpf_objects::undisturbed(|| loader.load(object.bytes));
    let mut loaded = loaded.map_err(|e| object.refused(e))?.map_err(|e| object.refused(e))?;
    let programs = loaded.programs_mut().map(|(name, program)| {
        let verify =
            |source| EbpfError::Verify { program: name.to_owned(), source: Box::new(source) };
        Ok((name.to_owned(), verified(program).map_err(verify)?))
    });
    programs.collect()
}

/// Hands a program to the kernel.
fn verified(program: &mut Program) -> Result<OwnedFd, ProgramError> {
    keelson_ebpf_objects::load(program)?;
    program.fd()?.as_fd().try_clone_to_owned().map_err(ProgramError::IOError)
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
