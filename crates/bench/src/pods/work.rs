//! The work itself: one pod at a time, many at once, nothing at all.

use std::time::{Duration, Instant};

use anyhow::Result;
use kube::Client;

use super::manifest::{COLLECTION, pod};
use super::rows;
use super::watch::{Milestone, PodWatch};
use crate::api::{self, NewObject, PATIENCE};
use crate::machine::BusyWatch;
use crate::process::Memory;
use crate::report::Report;
use crate::stats::Samples;
use crate::subject::node::{CpuParts, NodeUnderTest};

/// Requests on their way at the same time: enough to keep the server busy, few enough not to measure the client.
const AT_ONCE: usize = 8;

/// One node and where its figures go.
pub(super) struct Bench<'a> {
    report: &'a mut Report,
    node: &'a NodeUnderTest,
    client: &'a Client,
    watch: PodWatch,
    /// So that no name is used twice.
    made: u32,
}

impl<'a> Bench<'a> {
    pub(super) async fn new(
        report: &'a mut Report,
        node: &'a NodeUnderTest,
        client: &'a Client,
    ) -> Result<Bench<'a>> {
        let watch = PodWatch::start(client).await?;
        Ok(Bench { report, node, client, watch, made: 0 })
    }

    /// One after the other: POST to Ready, then DELETE to gone.
    pub(super) async fn serial(&mut self, count: u32, with_node_name: bool) -> Result<()> {
        let (mut start, mut end) = (Samples::default(), Samples::default());
        for _ in 0..count {
            let object = self.next_pod(with_node_name);
            let name = name_of(&object);
            let began = Instant::now();
            api::create(self.client, &object).await?;
            let ready = self.wait(std::slice::from_ref(&name), Milestone::Ready).await?;
            start.push((ready - began).as_secs_f64());
            let began = Instant::now();
            api::delete(self.client, COLLECTION, &name).await?;
            let gone = self.wait(&[name], Milestone::Gone).await?;
            end.push((gone - began).as_secs_f64());
        }
        self.report.enter_spread(&self.node.label, &rows::start(with_node_name), &start);
        self.report.enter_spread(&self.node.label, &rows::end(with_node_name), &end);
        Ok(())
    }

    /// All at once, several times.
    pub(super) async fn bursts(&mut self, rounds: u32, pods: u32) -> Result<()> {
        let (mut ready, mut gone) = (Samples::default(), Samples::default());
        let mut parts: Vec<CpuParts> = Vec::new();
        for round in 0..rounds {
            let objects: Vec<NewObject> = (0..pods).map(|_| self.next_pod(true)).collect();
            let names: Vec<String> = objects.iter().map(name_of).collect();
            let before = self.node.cpu();
            let busy = BusyWatch::start();
            let began = Instant::now();
            api::create_all(self.client, objects, AT_ONCE).await?;
            let last = self.wait(&names, Milestone::Ready).await?;
            ready.push((last - began).as_secs_f64());
            parts.push(self.node.cpu().since(&before));
            self.note_disturbance(&busy, &parts, round);
            if round + 1 == rounds {
                self.memory(&format!("with {pods} pods"), None);
            }
            let began = Instant::now();
            self.delete_all(&names).await?;
            let last = self.wait(&names, Milestone::Gone).await?;
            gone.push((last - began).as_secs_f64());
        }
        self.enter_median(rows::burst(pods), &ready);
        self.enter_cpu(pods, &parts);
        self.enter_median(rows::burst_gone(pods), &gone);
        Ok(())
    }

    /// Nothing happens: what does the agent spend?
    pub(super) async fn idle(&mut self, secs: u64, when: &str, goal: Option<f64>) -> Result<()> {
        // What the work before still has to settle is not idling.
        tokio::time::sleep(Duration::from_secs(3)).await;
        let (before, began) = (self.node.cpu(), Instant::now());
        tokio::time::sleep(Duration::from_secs(secs)).await;
        let share = self.node.cpu().since(&before).agent / began.elapsed().as_secs_f64();
        let mut row = rows::idle(when);
        row.goal = goal;
        self.report.enter(&self.node.label, &row, share * 100.0, &[]);
        Ok(())
    }

    /// Memory of everybody, at this moment.
    pub(super) fn memory(&mut self, when: &str, goal: Option<f64>) {
        let agent = self.node.agent.memory();
        self.enter_memory("the agent", when, agent, goal);
        let companions = self.node.agent.companions();
        if !companions.is_empty() {
            let sum: f64 = companions.iter().map(|pid| proportional(Memory::of(*pid))).sum();
            let row = rows::memory("the agent's own children (PSS)", when);
            self.report.enter(&self.node.label, &row, sum, &[]);
        }
        let (containerd, shims) = self.node.runtime_memory();
        self.enter_memory("containerd", when, containerd, None);
        if shims > 0.0 {
            let row = rows::memory("all shims (PSS)", when);
            self.report.enter(&self.node.label, &row, shims, &[]);
        }
    }

    fn enter_memory(&mut self, who: &str, when: &str, memory: Memory, goal: Option<f64>) {
        let mut row = rows::memory(who, when);
        row.goal = goal;
        self.report.enter(&self.node.label, &row, memory.resident, &[]);
        if let Some(pss) = memory.proportional {
            let row = rows::memory(&format!("{who} (PSS)"), when);
            self.report.enter(&self.node.label, &row, pss, &[]);
        }
    }

    fn enter_median(&mut self, row: crate::report::Row, samples: &Samples) {
        if let Some(median) = samples.median() {
            self.report.enter(&self.node.label, &row, median, samples.as_slice());
        }
    }

    fn enter_cpu(&mut self, pods: u32, parts: &[CpuParts]) {
        let mut enter = |part: &str, goal: Option<f64>, of: fn(&CpuParts) -> f64| {
            let samples: Vec<f64> = parts.iter().map(of).collect();
            let mut row = rows::cpu(pods, part);
            row.goal = goal;
            self.enter_median(row, &Samples::from(&samples[..]));
        };
        enter("agent and containerd with all children", (pods == 40).then_some(1.7), |p| {
            p.agent + p.runtime
        });
        enter("agent alone", None, |p| p.agent_own);
        enter("agent's children", None, |p| p.agent - p.agent_own);
        enter("containerd alone", None, |p| p.containerd);
        enter("shims and runc", None, |p| p.runtime - p.containerd);
        enter("in the pods' own cgroups", None, |p| p.pods);
    }

    /// A busy neighbour changes every figure: say so.
    fn note_disturbance(&mut self, busy: &BusyWatch, parts: &[CpuParts], round: u32) {
        let (Some((all, wall)), Some(ours)) = (busy.end(), parts.last()) else { return };
        let others = (all - ours.agent - ours.runtime - ours.pods).max(0.0) / wall.as_secs_f64();
        if others > 0.5 {
            self.report.notes.push(format!(
                "{}, burst {}: API server, bench and strangers used {others:.1} cores meanwhile",
                self.node.label,
                round + 1
            ));
        }
    }

    fn next_pod(&mut self, with_node_name: bool) -> NewObject {
        self.made += 1;
        let node = with_node_name.then_some(self.node.node_name);
        pod(&format!("bench-{}", self.made), self.node.image, node)
    }

    /// The moment at which the last of `names` reached `what`.
    async fn wait(&mut self, names: &[String], what: Milestone) -> Result<Instant> {
        let moments = self.watch.all(names, what, PATIENCE).await?;
        Ok(moments.last().copied().unwrap_or_else(Instant::now))
    }

    async fn delete_all(&self, names: &[String]) -> Result<()> {
        use futures_util::{StreamExt, TryStreamExt, stream};
        let requests = names.iter().map(|name| api::delete(self.client, COLLECTION, name));
        stream::iter(requests).buffer_unordered(AT_ONCE).try_collect().await
    }
}

fn proportional(memory: Memory) -> f64 {
    memory.proportional.unwrap_or(memory.resident)
}

fn name_of(object: &NewObject) -> String {
    object.body["metadata"]["name"].as_str().unwrap_or_default().to_owned()
}
