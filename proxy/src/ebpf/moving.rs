//! Moves what maps hold to other ones: to larger ones, or to those of another version.
//!
//! ```text
//! 1  maps-next/NAME    is made, and filled while NAME goes on being used
//! 2                    no connection begins; what changed meanwhile is copied
//! 3  maps-before/NAME  is what NAME was, and NAME is the new one: from here on there is no way back
//! 4                    programs that use the new maps take the place of those that use the old ones
//! 5                    what those still wrote is copied, maps-before goes, connections begin again
//! ```
//!
//! A filter that is lost while the tables of connections are there takes part: it is filled from these.
//!
//! A process that is killed before 3 has changed nothing. After it, the old programs go on with the old maps until
//! the next start goes on with 4. Maps whose shape does not change stay where they are.

use std::collections::BTreeMap;
use std::fs;
use std::mem::offset_of;
use std::os::fd::AsFd;
use std::path::{Path, PathBuf};
use std::time::Duration;

use keelson_ebpf_abi::{ANEW, Settings, VERSION};

use super::alarm::monotonic_ns;
use super::error::EbpfError;
use super::filter::{self, FILTERS};
use super::raw::{Raw, What};
use super::sys::{self, MapInfo};

/// No longer than that does no connection begin, also when the process is killed.
const HOLD: Duration = Duration::from_secs(3);
/// The tables of connections.
const FLOWS: [&str; 2] = ["flows_in", "flows_out"];
/// Written by user space alone, which does nothing else while it moves them.
const WRITTEN_HERE: [&str; 11] = [
    "addresses",
    "exempt",
    "frontends",
    "interfaces",
    "members",
    "pod_ranges",
    "pools",
    "service_ranges",
    "settings",
    "slots",
    "sources",
];

/// Where the maps of this version are pinned.
pub(crate) fn maps_folder(pins: &Path) -> PathBuf {
    pins.join(format!("maps-v{VERSION}"))
}

fn next_folder(pins: &Path) -> PathBuf {
    pins.join("maps-next")
}

fn before_folder(pins: &Path) -> PathBuf {
    pins.join("maps-before")
}

/// The maps that another version left, the latest first.
fn other_versions(pins: &Path) -> Vec<(u32, PathBuf)> {
    let entries = fs::read_dir(pins).into_iter().flatten().flatten();
    let mut found: Vec<_> = entries
        .filter_map(|entry| {
            let version = entry.file_name().to_str()?.strip_prefix("maps-v")?.parse().ok()?;
            (version != VERSION).then(|| (version, entry.path()))
        })
        .collect();
    found.sort_unstable_by(|a, b| b.cmp(a));
    found
}

/// What a map is like.
pub(crate) type Shapes = BTreeMap<String, MapInfo>;

/// Maps that are to be replaced.
pub(crate) struct Moving {
    pins: PathBuf,
    /// By name, where each is now.
    from: BTreeMap<String, PathBuf>,
    /// Filters that are nowhere, though there are connections that they must let through.
    lost: Vec<&'static str>,
}

impl Moving {
    /// Compares what is pinned with what is wanted, and says what the maps shall be like. `size` is told a map's
    /// name, its shape, and what is there.
    pub(crate) fn plan(
        pins: &Path,
        mut wanted: Shapes,
        size: impl Fn(&str, &MapInfo, Option<&MapInfo>) -> u32,
    ) -> Result<(Self, Shapes), EbpfError> {
        remove(&next_folder(pins))?;
        let maps = maps_folder(pins);
        make(&maps)?;
        let (mut from, mut nowhere) = (BTreeMap::new(), Vec::new());
        for (name, shape) in &mut wanted {
            let here = maps.join(name);
            let there = match open(&here) {
                Some(map) => Some((here.clone(), map)),
                None => left_by_other_version(pins, name),
            };
            shape.max_entries = size(name, shape, there.as_ref().map(|(_, map)| map.info()));
            let Some((path, map)) = there else {
                nowhere.push(name.clone());
                continue;
            };
            // An earlier process did not finish: that comes first.
            let may_grow = !before_folder(pins).join(name).exists();
            let same_size = shape.max_entries == map.info().max_entries;
            if !fits(map.info(), shape) || !same_size && may_grow {
                from.insert(name.clone(), path);
            } else if path != here {
                pin(&map, &here)?;
            }
        }
        let is_nowhere = |name: &&str| nowhere.iter().any(|nowhere| nowhere == name);
        let lost = match FLOWS.iter().all(is_nowhere) {
            true => Vec::new(),
            false => FILTERS.into_iter().filter(is_nowhere).collect(),
        };
        Ok((Moving { pins: pins.to_owned(), from, lost }, wanted))
    }

    pub(crate) fn is_needed(&self) -> bool {
        !self.from.is_empty() || !self.lost.is_empty()
    }

    /// Where the map of that name is pinned that new programs shall use.
    pub(crate) fn home(&self, name: &str) -> PathBuf {
        let moves = self.from.contains_key(name) || self.lost.contains(&name);
        let folder = if moves { next_folder(&self.pins) } else { maps_folder(&self.pins) };
        folder.join(name)
    }

    /// To be called before the new maps are made.
    pub(crate) fn begin(&self) -> Result<(), EbpfError> {
        if self.is_needed() { make(&next_folder(&self.pins)) } else { Ok(()) }
    }

    /// Fills the new maps and puts them in the place of the old ones. The programs that use them must follow. Says
    /// since when the old ones may have got what the new ones have not.
    pub(crate) fn finish(&self) -> Result<u64, EbpfError> {
        let since = a_moment_ago()?;
        self.carry(What::All, |_| true)?;
        if FLOWS.iter().any(|name| self.from.contains_key(*name)) || !self.lost.is_empty() {
            self.hold()?;
            sys::wait_for_programs();
        }
        let last = a_moment_ago()?;
        self.carry(What::Since(since), |name| !WRITTEN_HERE.contains(&name) || name == "settings")?;
        for filter in &self.lost {
            let [arriving, leaving] = FLOWS.map(|name| self.home(name));
            filter::recall(filter, &self.home(filter), &arriving, &leaving)?;
        }
        let (next, before) = (next_folder(&self.pins), before_folder(&self.pins));
        // What an earlier process left there was copied at times that nobody knows.
        let known = !before.exists();
        if self.is_needed() {
            make(&before)?;
        }
        for (name, from) in &self.from {
            let fail = |source| EbpfError::Pin { path: from.clone(), source };
            let kept = before.join(name);
            if kept.exists() {
                fs::remove_file(&kept).map_err(fail)?;
            }
            pin(&Raw::open(from).map_err(fail)?, &kept)?;
            fs::rename(next.join(name), maps_folder(&self.pins).join(name)).map_err(fail)?;
            tracing::info!(map = name, "A map is replaced by one of another size or layout");
        }
        for name in &self.lost {
            let fail = |source| EbpfError::Pin { path: next.join(name), source };
            fs::rename(next.join(name), maps_folder(&self.pins).join(name)).map_err(fail)?;
            tracing::warn!(
                map = name,
                "A map was lost; it is filled from the connections that there are"
            );
        }
        remove(&next)?;
        Ok(if known { last } else { 0 })
    }

    fn carry(&self, what: What, which: impl Fn(&str) -> bool) -> Result<(), EbpfError> {
        for (name, from) in self.from.iter().filter(|(name, _)| which(name)) {
            let to = self.home(name);
            let fail = |source| EbpfError::Pin { path: to.clone(), source };
            let (from, to) = (Raw::open(from).map_err(fail)?, Raw::open(&to).map_err(fail)?);
            to.carry(name, &from, what).map_err(fail)?;
        }
        Ok(())
    }

    /// Tells the programs that are attached now.
    fn hold(&self) -> Result<(), EbpfError> {
        const SETTINGS: &str = "settings";
        let path = match self.from.get(SETTINGS) {
            Some(old) => old.clone(),
            None => maps_folder(&self.pins).join(SETTINGS),
        };
        let fail = |source| EbpfError::Pin { path: path.clone(), source };
        let until = monotonic_ns()?.saturating_add(nanoseconds(HOLD));
        let settings = Raw::open(&path).map_err(fail)?;
        settings.patch(0, offset_of!(Settings, held_until_ns), &until.to_ne_bytes()).map_err(fail)
    }
}

/// The last step: brings over what the old programs wrote since that time, now that nobody uses their maps any more.
/// True when there was something to do.
pub(crate) fn settle(pins: &Path, since_ns: u64) -> Result<bool, EbpfError> {
    let (before, maps) = (before_folder(pins), maps_folder(pins));
    let kept: Vec<_> = fs::read_dir(&before).into_iter().flatten().flatten().collect();
    for entry in &kept {
        let name = entry.file_name().to_string_lossy().into_owned();
        let fail = |source| EbpfError::Pin { path: entry.path(), source };
        if let Some(map) = open(&maps.join(&name))
            && !WRITTEN_HERE.contains(&&*name)
        {
            let old = Raw::open(&entry.path()).map_err(fail)?;
            if old.info().id != map.info().id {
                map.carry(&name, &old, What::MissingSince(since_ns)).map_err(fail)?;
            }
        }
        fs::remove_file(entry.path()).map_err(fail)?;
    }
    remove(&before)?;
    for (_, folder) in other_versions(pins) {
        remove(&folder)?;
    }
    Ok(!kept.is_empty())
}

/// The same shape, whatever the size.
fn fits(found: &MapInfo, wanted: &MapInfo) -> bool {
    let shape = |info: &MapInfo| (info.kind, info.key_size, info.value_size);
    shape(found) == shape(wanted)
}

/// A map of another version whose elements mean something here.
fn left_by_other_version(pins: &Path, name: &str) -> Option<(PathBuf, Raw)> {
    let means_another = |version: u32| {
        ANEW.iter().any(|(map, since)| *map == name && (version < *since) != (VERSION < *since))
    };
    let versions = other_versions(pins).into_iter();
    let paths = versions.filter(|(version, _)| !means_another(*version));
    let mut paths = paths.map(|(_, folder)| folder.join(name));
    paths.find_map(|path| open(&path).map(|map| (path, map)))
}

fn open(path: &Path) -> Option<Raw> {
    Raw::open(path).ok()
}

fn pin(map: &Raw, path: &Path) -> Result<(), EbpfError> {
    let fail = |source| EbpfError::Pin { path: path.to_owned(), source };
    sys::pin(map.descriptor().as_fd(), path).map_err(fail)
}

fn make(folder: &Path) -> Result<(), EbpfError> {
    let fail = |source| EbpfError::Pin { path: folder.to_owned(), source };
    fs::create_dir_all(folder).map_err(fail)
}

fn remove(folder: &Path) -> Result<(), EbpfError> {
    let fail = |source| EbpfError::Pin { path: folder.to_owned(), source };
    super::programs::remove(folder).map_err(fail)
}

/// A program may have looked at the clock and not have written yet.
fn a_moment_ago() -> Result<u64, EbpfError> {
    Ok(monotonic_ns()?.saturating_sub(nanoseconds(Duration::from_secs(1))))
}

fn nanoseconds(of: Duration) -> u64 {
    u64::try_from(of.as_nanos()).unwrap_or(u64::MAX)
}
