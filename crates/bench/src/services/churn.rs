//! A minute of many endpoint changes a second: how late a change is meanwhile, and whether all is right in the end.
//!
//! Each change turns a Service on (its only endpoint is the listener outside) or off (the usual number of endpoints,
//! where nobody answers), so that a connection tells whether the proxy has the API server's last word.

use std::net::SocketAddr;
use std::time::{Duration, Instant};

use anyhow::{Result, ensure};
use futures_util::{StreamExt, TryStreamExt, stream};
use kube::Client;

use super::{objects, probe};
use crate::api::{self, PATIENCE};
use crate::stats::Samples;

/// Changes on their way at the same time, or waiting for their moment.
const AT_ONCE: usize = 256;
/// Without a divisor in common with the number of Services: visits all of them, in a scattered order.
const STEP: u64 = 7919;

/// How much to do.
#[derive(Debug, Clone, Copy)]
pub(super) struct Churn {
    pub(super) per_second: u32,
    pub(super) duration: Duration,
    pub(super) services: u32,
    pub(super) endpoints: u32,
}

/// What came of it.
pub(super) struct Outcome {
    /// Changes that the API server took, per second.
    pub(super) taken: f64,
    /// Milliseconds from the API server's answer to a new Service until that answers.
    pub(super) lags: Samples,
    /// How long the changes went on.
    pub(super) took: Duration,
}

impl Churn {
    /// The Service that a change is about, and whether it is turned on: in each round every other one.
    fn change(&self, number: u32) -> (u32, bool) {
        let index = u64::from(number) * STEP % u64::from(self.services);
        let (index, round) = (u32::try_from(index).unwrap_or(0), number / self.services);
        (index, (index + round).is_multiple_of(2))
    }

    fn total(&self) -> u32 {
        let secs = u32::try_from(self.duration.as_secs()).unwrap_or(u32::MAX);
        self.per_second.saturating_mul(secs)
    }

    /// Changes, and measures new Services meanwhile.
    ///
    /// # Errors
    /// When the API server refuses, or a Service does not come into force.
    pub(super) async fn run(
        &self,
        client: &Client,
        backend: &probe::Backend,
        address: impl Fn(u32) -> SocketAddr,
    ) -> Result<Outcome> {
        let began = Instant::now();
        let changes = self.make_changes(client, backend);
        tokio::pin!(changes);
        let mut lags = Samples::default();
        for number in 1.. {
            let (index, name) = (number % 200 + 1, format!("churn-{number}"));
            let lag = lag(client, backend, &name, index, address(index));
            tokio::pin!(lag);
            tokio::select! {
                done = &mut changes => {
                    done?;
                    let took = began.elapsed();
                    lag.await?;
                    // One that comes after all changes and is in force: the proxy has seen them all.
                    self::lag(client, backend, "churn-last", 1, address(1)).await?;
                    let taken = f64::from(self.total()) / took.as_secs_f64();
                    return Ok(Outcome { taken, lags, took });
                }
                lag = &mut lag => lags.push(lag?),
            }
        }
        anyhow::bail!("there were more new Services than numbers")
    }

    async fn make_changes(&self, client: &Client, backend: &probe::Backend) -> Result<()> {
        let began = tokio::time::Instant::now();
        let changes = stream::iter(0..self.total()).map(|number| async move {
            let due = f64::from(number) / f64::from(self.per_second);
            tokio::time::sleep_until(began + Duration::from_secs_f64(due)).await;
            let (index, on) = self.change(number);
            self.turn(client, backend, index, on).await
        });
        changes.buffer_unordered(AT_ONCE).try_collect().await
    }

    async fn turn(
        &self,
        client: &Client,
        backend: &probe::Backend,
        index: u32,
        on: bool,
    ) -> Result<()> {
        let endpoint = on.then(|| backend.endpoint());
        objects::turn(client, index, endpoint, self.endpoints).await
    }

    /// Which Services are on after all changes.
    fn on_in_the_end(&self) -> Vec<bool> {
        let mut on = vec![false; self.services as usize];
        for number in 0..self.total() {
            let (index, turned_on) = self.change(number);
            on[index as usize] = turned_on;
        }
        on
    }

    /// Asks every Service, then turns all off again.
    ///
    /// # Errors
    /// When one is not as the API server knows it.
    pub(super) async fn check(&self, client: &Client, backend: &probe::Backend) -> Result<()> {
        let on = self.on_in_the_end();
        let states = on.iter().zip(0..).map(|(on, index)| {
            let at = SocketAddr::new(objects::cluster_ip(index), objects::PORT);
            (at, *on)
        });
        let wrong = probe::wrong(states.collect()).await?;
        let off = stream::iter((0..self.services).filter(|index| on[*index as usize]))
            .map(|index| self.turn(client, backend, index, false));
        off.buffer_unordered(AT_ONCE).try_collect::<()>().await?;
        ensure!(wrong.is_empty(), "not as the API server knows them in the end: {wrong:?}");
        Ok(())
    }
}

/// Milliseconds from the API server's answer until a new Service answers.
async fn lag(
    client: &Client,
    backend: &probe::Backend,
    name: &str,
    index: u32,
    address: SocketAddr,
) -> Result<f64> {
    let [slice, service] = objects::marker(name, index, backend.endpoint());
    api::create(client, &slice).await?;
    let create = async {
        api::create(client, &service).await?;
        Ok::<_, anyhow::Error>(Instant::now())
    };
    let (created, effective) = tokio::join!(create, probe::until(address, true, PATIENCE));
    let lag = effective?.saturating_duration_since(created?);
    objects::delete(client, name).await?;
    probe::until(address, false, PATIENCE).await?;
    Ok(lag.as_secs_f64() * 1e3)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn every_service_is_turned_on_and_off_in_turn() {
        let churn =
            Churn { per_second: 10, duration: Duration::from_secs(3), services: 10, endpoints: 1 };
        assert_eq!(churn.total(), 30);
        for round in 0..3 {
            let mut seen: Vec<u32> = (0..10).map(|n| churn.change(round * 10 + n).0).collect();
            seen.sort_unstable();
            assert_eq!(seen, (0..10).collect::<Vec<_>>());
            let changes = (0..10).map(|n| churn.change(round * 10 + n));
            assert!(changes.into_iter().all(|(index, on)| on == ((index + round) % 2 == 0)));
        }
        let on = [true, false].repeat(5);
        assert_eq!(churn.on_in_the_end(), on);
    }
}
