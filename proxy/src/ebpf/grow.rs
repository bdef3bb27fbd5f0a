//! Maps become larger before they are full, as far as the configuration allows.

use super::alarm::monotonic_ns;
use super::refusals::Refusals;
use super::sizes::{Amounts, Bounds, Needs};
use super::{Ebpf, EbpfError, Kernel, moving};
use crate::backend::MapFill;
use crate::switch::with_sources;

/// The next attempt after one that the kernel refused.
const PATIENCE_NS: u64 = 60 * 1_000_000_000;

impl Ebpf {
    /// What maps must have room for, with so much of Services.
    pub(super) fn needs(&self, mut services: Amounts) -> Needs {
        services.addresses = services.addresses.saturating_add(self.own_addresses);
        Needs::services(&services)
    }

    /// Before that much is put in force.
    pub(super) fn make_room(
        &mut self,
        kernel: &mut Kernel,
        adds: Amounts,
    ) -> Result<(), EbpfError> {
        let needs = self.needs(self.used.plus(adds));
        let wants = |(map, max_entries): &(&'static str, u32)| {
            needs.of(map) > *max_entries && *max_entries < self.most(map)
        };
        if kernel.maps.room().entries().iter().any(wants) {
            self.grow(kernel, &needs)?;
        }
        Ok(())
    }

    /// Once a second: tables that programs fill.
    pub(super) fn tend(&mut self) -> Result<(), EbpfError> {
        let Some(mut kernel) = self.kernel.take() else { return Ok(()) };
        let checked =
            monotonic_ns().and_then(|now_ns| kernel.frames.check_neighbours(&self.netns, now_ns));
        let tended = self.tend_tables(&mut kernel).and(checked);
        self.kernel = Some(kernel);
        tended
    }

    fn tend_tables(&mut self, kernel: &mut Kernel) -> Result<(), EbpfError> {
        if !kernel.tables.tend(&kernel.maps.pools, monotonic_ns()?)? {
            return Ok(());
        }
        match kernel.tables.wants() {
            Some(needs) => self.grow(kernel, &needs),
            None => Ok(()),
        }
    }

    /// Moves what is in maps that are too small. Where that is impossible they stay as they are.
    fn grow(&mut self, kernel: &mut Kernel, needs: &Needs) -> Result<(), EbpfError> {
        let now = monotonic_ns()?;
        if now < self.grow_again_ns {
            return Ok(());
        }
        match self.kernel(needs) {
            // Nothing that could grow.
            Ok((_, 0)) => return Ok(()),
            Ok((grown, _)) => {
                let frames = std::mem::take(&mut kernel.frames);
                *kernel = Kernel { frames, ..grown };
            }
            Err(error) => {
                self.grow_again_ns = now.saturating_add(PATIENCE_NS);
                tracing::warn!(error = with_sources(&error), "BPF maps cannot become larger");
                return Ok(());
            }
        }
        let mut refusals = Refusals::of_part();
        self.attach(kernel, &mut refusals)?;
        self.troubles.note(refusals, now);
        self.settle(kernel).map(drop)
    }

    /// The programs are attached: what belongs to those before them goes.
    pub(super) fn settle(&self, kernel: &Kernel) -> Result<usize, EbpfError> {
        let moved = moving::settle(&self.config.ebpf.pins, kernel.programs.copied_ns)?;
        let found = kernel.maps.settings.get(&0)?.unwrap_or_default();
        if found.held_until_ns != 0 {
            let settings = keelson_ebpf_abi::Settings { held_until_ns: 0, ..found };
            kernel.maps.settings.put(&0, &settings)?;
        }
        Ok(usize::from(moved))
    }

    /// How full the maps are.
    pub(super) fn fills(&self) -> Vec<MapFill> {
        let Some(kernel) = &self.kernel else { return Vec::new() };
        let (used, room) = (self.needs(self.used), kernel.maps.room().entries());
        let services = room.iter().map(|(map, max_entries)| MapFill {
            map,
            entries: used.of(map),
            max_entries: *max_entries,
            may_grow: *max_entries < self.most(map),
        });
        services.chain(kernel.tables.fills()).collect()
    }

    /// How large a map may become.
    fn most(&self, map: &str) -> u32 {
        Bounds::of(map, &self.config.ebpf, 1).map_or(0, |bounds| bounds.most)
    }
}
