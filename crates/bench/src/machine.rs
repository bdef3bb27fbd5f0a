//! The machine under the figures, and how busy others kept it meanwhile.

use std::fs;
use std::time::{Duration, Instant};

use serde::Serialize;

/// Linux counts CPU time for user space in these, on every architecture (USER_HZ).
pub(crate) const TICKS_PER_SECOND: f64 = 100.0;

/// What figures depend on.
#[derive(Debug, Clone, Serialize)]
pub(crate) struct Machine {
    pub(crate) cores: usize,
    pub(crate) kernel: String,
    pub(crate) memory_mib: u64,
}

impl Machine {
    pub(crate) fn look() -> Machine {
        let read = |path: &str| fs::read_to_string(path).unwrap_or_default();
        Machine {
            cores: std::thread::available_parallelism().map_or(0, usize::from),
            kernel: read("/proc/sys/kernel/osrelease").trim().to_owned(),
            memory_mib: meminfo_total_kib(&read("/proc/meminfo")).unwrap_or(0) / 1024,
        }
    }
}

fn meminfo_total_kib(meminfo: &str) -> Option<u64> {
    let line = meminfo.lines().find(|l| l.starts_with("MemTotal:"))?;
    line.split_whitespace().nth(1)?.parse().ok()
}

/// Watches how much CPU the whole machine uses during a piece of work.
#[derive(Debug)]
pub(crate) struct BusyWatch {
    began: Instant,
    busy: Option<f64>,
}

impl BusyWatch {
    pub(crate) fn start() -> BusyWatch {
        BusyWatch { began: Instant::now(), busy: busy_now() }
    }

    /// CPU seconds that the whole machine used since the start, and the time that passed.
    pub(crate) fn end(&self) -> Option<(f64, Duration)> {
        Some((busy_now()? - self.busy?, self.began.elapsed()))
    }
}

fn busy_now() -> Option<f64> {
    busy_seconds(&fs::read_to_string("/proc/stat").ok()?)
}

/// All but idle and iowait of the first line of /proc/stat (proc_stat(5)).
fn busy_seconds(stat: &str) -> Option<f64> {
    let line = stat.lines().next()?.strip_prefix("cpu ")?;
    let fields: Vec<f64> = line.split_whitespace().filter_map(|f| f.parse().ok()).collect();
    // user nice system idle iowait irq softirq steal; the guests' time is part of user already.
    let busy: f64 = [0, 1, 2, 5, 6].iter().filter_map(|i| fields.get(*i)).sum();
    Some(busy / TICKS_PER_SECOND)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn waiting_and_stolen_time_is_not_busy() {
        let stat = "cpu  100 20 30 9999 888 7 3 555 0 0\ncpu0 1 2 3\n";
        assert_eq!(busy_seconds(stat), Some(1.6));
        assert_eq!(busy_seconds("intr 5\n"), None);
    }

    #[test]
    fn memory_is_that_of_the_machine() {
        assert_eq!(meminfo_total_kib("MemTotal:       1000 kB\nMemFree: 5 kB\n"), Some(1000));
    }
}
