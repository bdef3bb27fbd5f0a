//! Start and repair: reads the maps, keeps what is right, mends what is not.

use std::collections::HashSet;
use std::sync::Arc;

use super::alarm::monotonic_ns;
use super::attach::{Links, Way};
use super::config::Algorithm;
use super::follow::read_node;
use super::item::Operations;
use super::maps::Maps;
use super::numbering::{Numbers, number};
use super::observed::Observed;
use super::programmed::{Pending, Programmed};
use super::programs::Programs;
use super::refusals::Refusals;
use super::sizes::{Amounts, Needs};
use super::xdp::Frames;
use super::{Ebpf, EbpfError, Kernel, sys};
use crate::backend::{Applied, Difference};
use crate::diff::{Plans, sorted};
use crate::model::{ServiceKey, ServicePlan};
use crate::switch::with_sources;

/// Services that are compared and put in force at a time: nothing is taken away meanwhile, so there is no need to have
/// all elements of all of them in memory.
const AT_ONCE: usize = 500;

impl Ebpf {
    pub(super) fn adopt_all(&mut self, plans: &Plans) -> Result<Applied, EbpfError> {
        // The old descriptors are of no use if somebody removed the pins.
        let frames = self.kernel.take().map(|kernel| kernel.frames);
        let mut refusals = Refusals::default();
        let node = self.observe_node()?;
        let algorithm = self.config.ebpf.algorithm;
        let all = Amounts::of_plans(plans.values().map(|plan| &**plan), algorithm);
        let (mut kernel, mut operations) = self.kernel(&self.needs(all)).or_else(|error| {
            let error = with_sources(&error);
            tracing::warn!(%error, "BPF maps cannot be as large as needed, trying with those that there are");
            self.kernel(&Needs::default())
        })?;
        // So that what was said of them is not said again.
        kernel.frames = frames.unwrap_or_default();
        let settings = kernel.maps.settings.get(&0)?.unwrap_or_default();
        self.numbers = Numbers::after(settings.numbers);
        operations += self.adopt_node(&kernel, settings, node, &mut refusals)?;
        // What begins at one interface must find the programs at all others, so first all are attached. As long as they
        // find no Service, they change nothing.
        operations += self.attach(&mut kernel, &mut refusals)?;
        operations += self.settle(&kernel)?;
        let mut observed = Observed::read(&kernel.maps)?;
        kernel.maps.filter.add_addresses(observed.destinations())?;
        self.used = observed.amounts();
        let mut applied = self.adopt_services(&mut kernel, plans, &mut observed)?;
        let leftovers = Operations { puts: Vec::new(), deletes: observed.leftovers() };
        kernel.maps.perform(&leftovers)?;
        self.used = self.used.minus(Amounts::of_keys(leftovers.deletes.iter()));
        self.adopt_counters(&kernel)?;
        let node = self.observe_node()?;
        operations += leftovers.len() + self.refresh_node(&kernel, node, &mut refusals)?;
        self.troubles.note(refusals, monotonic_ns()?);
        applied.operations += operations;
        // Endpoints may have gone while no proxy ran.
        kernel.ender.look();
        // The loader has read the types of the whole kernel, and we all maps.
        sys::give_back_memory();
        self.kernel = Some(kernel);
        self.alarm.start_clock()?;
        self.alarm.follow(&mut self.exempt)?;
        Ok(applied)
    }

    fn adopt_services(
        &mut self,
        kernel: &mut Kernel,
        plans: &Plans,
        observed: &mut Observed,
    ) -> Result<Applied, EbpfError> {
        self.programmed.clear();
        let mut applied = Applied::default();
        let algorithm = self.config.ebpf.algorithm;
        for part in sorted(plans).chunks(AT_ONCE) {
            let compared = part.iter();
            let all = compared
                .map(|(service, plan)| {
                    compare(service, plan, observed, &mut self.numbers, algorithm)
                })
                .collect();
            let Applied { operations, refused } = self.perform(kernel, all)?;
            applied.operations += operations;
            applied.refused.extend(refused);
        }
        Ok(applied)
    }

    /// Forgets what was counted of Services that are gone.
    fn adopt_counters(&self, kernel: &Kernel) -> Result<(), EbpfError> {
        let numbers: HashSet<u32> =
            self.programmed.values().flat_map(Programmed::numbers).collect();
        for number in kernel.maps.counters.read()?.keys() {
            if !numbers.contains(number) {
                kernel.maps.counters.delete(number)?;
            }
        }
        self.tally.complete(&Programs::maps_folder(&self.config.ebpf.pins), &numbers);
        Ok(())
    }

    /// What adopting would change.
    pub(super) fn differences(&mut self, plans: &Plans) -> Result<Vec<Difference>, EbpfError> {
        let mut found = Vec::new();
        let mut differs = |service: Option<&ServiceKey>, what: String| {
            found.push(Difference { service: service.cloned(), what });
        };
        let pins = self.config.ebpf.pins.clone();
        let Ok(maps) = Maps::open(&Programs::maps_folder(&pins)) else {
            differs(None, "no maps are pinned".to_owned());
            return Ok(found);
        };
        let Some(programs) = Programs::found(&pins)? else {
            differs(None, "no programs are pinned".to_owned());
            return Ok(found);
        };
        let node = self.observe_node()?;
        let (links, way) = (Links::open(&pins)?, Way::find(&programs, &self.netns)?);
        let interfaces = node.interfaces.keys().copied();
        for pin in links.missing(self.serves_sockets(), interfaces, way, &self.netns) {
            differs(None, format!("{pin} is not attached"));
        }
        let frames = self.kernel.as_ref().map(|kernel| &kernel.frames);
        for pin in frames.into_iter().flat_map(Frames::pins).filter(|pin| !links.works(pin)) {
            differs(None, format!("{pin} is not attached"));
        }
        if read_node(&maps, maps.settings.get(&0)?.unwrap_or_default())? != node {
            differs(
                None,
                "what the programs know of the node's interfaces and addresses".to_owned(),
            );
        }
        let mut observed = Observed::read(&maps)?;
        let (mut numbers, algorithm) = (self.numbers, self.config.ebpf.algorithm);
        for (service, plan) in sorted(plans) {
            let pending = compare(service, plan, &mut observed, &mut numbers, algorithm);
            for item in &pending.operations.puts {
                differs(Some(service), format!("missing in {item}"));
            }
        }
        for key in observed.leftovers() {
            differs(None, format!("belongs to no Service: {key:?}"));
        }
        Ok(found)
    }
}

/// What must change for one Service.
fn compare(
    service: &ServiceKey,
    plan: &Arc<ServicePlan>,
    observed: &mut Observed,
    numbers: &mut Numbers,
    algorithm: Algorithm,
) -> Pending {
    let ports = number(plan, observed, numbers, algorithm);
    let programmed = Programmed { plan: Arc::clone(plan), ports };
    let (mut operations, mut adds) = (Operations::default(), Amounts::default());
    for item in programmed.items() {
        observed.settle(&item, &mut operations, &mut adds);
    }
    Pending { service: service.clone(), before: None, after: Some(programmed), operations, adds }
}
