//! Clocks that jump: what is wrong with the node's time must not change what is in force, or when.

use std::os::fd::BorrowedFd;
use std::sync::Mutex;
use std::time::SystemTime;

use keelson_netlink::nft::NftError;
use kube::runtime::watcher::Event;
use serde_json::{Value, json};

use super::*;
use crate::backend::{BackendConfig, Difference};
use crate::nftables::NftablesError;

const DAY: Duration = Duration::from_secs(24 * 60 * 60);

/// Says what it is told to say, and counts how often it is asked.
#[derive(Default)]
struct Answers {
    fails: bool,
    refuses: bool,
    is_confused: bool,
    asked: u32,
    disturbed: u32,
}

struct Fake {
    answers: Arc<Mutex<Answers>>,
    alarm: Arc<EventFd>,
}

fn broken() -> BackendError {
    NftablesError::Apply(NftError::Interrupted).into()
}

impl Fake {
    fn answer(&self, plans: &Plans) -> Result<Applied, BackendError> {
        let mut answers = self.answers.lock().unwrap();
        answers.asked += 1;
        if answers.fails {
            return Err(broken());
        }
        let refused = plans.keys().filter(|_| answers.refuses).map(|s| (s.clone(), broken()));
        Ok(Applied { operations: 1, refused: refused.collect() })
    }
}

impl Backend for Fake {
    fn adopt(&mut self, plans: &Plans) -> Result<Applied, BackendError> {
        self.answer(plans)
    }

    fn apply(&mut self, _: &[Change], plans: &Plans) -> Result<Applied, BackendError> {
        self.answer(plans)
    }

    fn configure(&mut self, _: BackendConfig) -> bool {
        false
    }

    fn verify(&mut self, _: &Plans) -> Result<Vec<Difference>, BackendError> {
        Ok(Vec::new())
    }

    fn alarm(&self) -> BorrowedFd<'_> {
        self.alarm.as_fd()
    }

    fn disturbed(&mut self) -> Result<bool, BackendError> {
        let mut answers = self.answers.lock().unwrap();
        answers.disturbed += 1;
        if answers.is_confused { Err(broken()) } else { Ok(false) }
    }

    fn cleanup(&mut self) -> Result<(), BackendError> {
        Ok(())
    }
}

/// An engine without a kernel, and the clocks that it sees.
struct World {
    engine: Engine,
    mailbox: Mailbox,
    answers: Arc<Mutex<Answers>>,
    alarm: Arc<EventFd>,
    now: Arc<Mutex<Now>>,
    folder: tempfile::TempDir,
}

impl World {
    fn new() -> Self {
        let folder = tempfile::tempdir().unwrap();
        let config = ProxyConfig {
            node_name: "here".to_owned(),
            state_file: Some(folder.path().join("state")),
            ..ProxyConfig::default()
        };
        let listeners = Listeners {
            metrics: Arc::new(Metrics::new(Mode::Nftables)),
            progress: Arc::default(),
            notices: Notices::channel().0,
            health_checks: HealthChecks::channel().0,
            loopback6: Loopback6::channel().0,
            on_synced: Box::new(|| {}),
        };
        let answers = Arc::<Mutex<Answers>>::default();
        let alarm = Arc::new(EventFd::new().unwrap());
        let fake = Fake { answers: Arc::clone(&answers), alarm: Arc::clone(&alarm) };
        let backend = |_| Ok::<Box<dyn Backend>, _>(Box::new(fake));
        let (mut engine, mailbox) =
            Engine::with_backend(config, Mode::Nftables, backend, listeners).unwrap();
        // Nothing of this machine is to be looked for.
        engine.alone = true;
        let now = Arc::new(Mutex::new(Now::read()));
        let shown = Arc::clone(&now);
        engine.clock = Box::new(move || *shown.lock().unwrap());
        let mut world = World { engine, mailbox, answers, alarm, now, folder };
        world.send(Wake::Node(Event::InitDone));
        world.send(Wake::Service(Event::InitDone));
        world.send(Wake::Slice(Event::InitDone));
        world
    }

    fn send(&mut self, wake: Wake) {
        assert!(self.mailbox.send(wake));
    }

    /// One turn of the loop.
    fn turn(&mut self) {
        assert!(self.engine.take_in(*self.now.lock().unwrap()));
        self.engine.put_in_force(false);
    }

    /// Time goes by.
    fn pass(&self, time: Duration) {
        let mut now = self.now.lock().unwrap();
        *now = Now { steady: now.steady + time, wall: now.wall + time };
    }

    /// Somebody sets the node's clock.
    fn set_clock(&self, to: impl FnOnce(SystemTime) -> SystemTime) {
        let mut now = self.now.lock().unwrap();
        now.wall = to(now.wall);
    }

    fn asked(&self) -> u32 {
        self.answers.lock().unwrap().asked
    }

    fn service(&mut self) {
        let object = json!({
            "metadata": {"namespace": "ns", "name": "web"},
            "spec": {"type": "ClusterIP", "clusterIP": "10.0.0.1", "ports": [{"port": 80}]},
        });
        self.send(Wake::Service(Event::Apply(serde_json::from_value(object).unwrap())));
    }

    fn endpoint(&mut self, caused: SystemTime) {
        let object = slice(jiff::Timestamp::try_from(caused).unwrap());
        self.send(Wake::Slice(Event::Apply(serde_json::from_value(object).unwrap())));
    }

    fn healthy(&self) -> bool {
        let now = *self.now.lock().unwrap();
        self.engine.progress.get().is_healthy(Duration::from_secs(60), now)
    }
}

fn slice(caused: jiff::Timestamp) -> Value {
    json!({
        "metadata": {
            "namespace": "ns", "name": "web-x",
            "labels": {"kubernetes.io/service-name": "web"},
            "annotations": {"endpoints.kubernetes.io/last-change-trigger-time": caused.to_string()},
        },
        "addressType": "IPv4",
        "endpoints": [{"addresses": [format!("10.1.0.{}", caused.as_second() % 200)]}],
        "ports": [{"name": "", "protocol": "TCP", "port": 8080}],
    })
}

/// Both directions, each far more than any timer.
const JUMPS: [fn(SystemTime) -> SystemTime; 2] = [|wall| wall + DAY, |wall| wall - DAY];

#[test]
fn retries_come_when_they_are_due_however_the_clock_jumps() {
    for jump in JUMPS {
        let mut world = World::new();
        world.answers.lock().unwrap().fails = true;
        world.turn();
        assert_eq!(world.asked(), 1);
        world.set_clock(jump);
        world.pass(RETRY - Duration::from_millis(1));
        let now = *world.now.lock().unwrap();
        assert_eq!(world.engine.timeout(now).as_millis(), Some(2));
        assert!(world.engine.retry_at.is_some_and(|at| at > now.steady));
        world.pass(Duration::from_millis(1));
        world.answers.lock().unwrap().fails = false;
        world.turn();
        assert_eq!(world.asked(), 2);
        // A single Service that the kernel refuses.
        world.answers.lock().unwrap().refuses = true;
        world.service();
        world.turn();
        assert_eq!(world.asked(), 3);
        world.set_clock(jump);
        world.turn();
        world.pass(RETRY_REFUSED - Duration::from_millis(1));
        world.turn();
        assert_eq!(world.asked(), 3);
        world.pass(Duration::from_millis(1));
        world.turn();
        assert_eq!(world.asked(), 4);
    }
}

#[test]
fn health_depends_on_how_long_changes_really_wait() {
    for jump in JUMPS {
        let mut world = World::new();
        world.turn();
        assert!(world.healthy());
        world.answers.lock().unwrap().fails = true;
        world.service();
        world.turn();
        world.set_clock(jump);
        assert!(world.healthy(), "nothing has waited for long");
        world.pass(Duration::from_secs(61));
        assert!(!world.healthy());
        world.set_clock(jump);
        assert!(!world.healthy());
        world.answers.lock().unwrap().fails = false;
        world.turn();
        assert!(world.healthy());
    }
}

#[test]
fn programming_latency_is_never_negative_and_does_not_jump_with_the_clock() {
    let sum = |world: &World| {
        let text = world.engine.metrics.text("");
        let name = "kubeproxy_network_programming_duration_seconds_sum{ip_family=\"IPv4\"} ";
        let line = text.lines().find_map(|line| line.strip_prefix(name)).unwrap().to_owned();
        line.parse::<f64>().unwrap()
    };
    for jump in JUMPS {
        let mut world = World::new();
        world.service();
        world.turn();
        let wall = world.now.lock().unwrap().wall;
        world.endpoint(wall - Duration::from_secs(2));
        assert!(world.engine.take_in(*world.now.lock().unwrap()));
        // Between its arrival and the moment at which it is in force.
        world.set_clock(jump);
        world.pass(Duration::from_secs(1));
        world.turn();
        assert!((sum(&world) - 3.0).abs() < 1e-3, "{}", sum(&world));
        // The other machine's clock is ahead of ours.
        let wall = world.now.lock().unwrap().wall;
        world.endpoint(wall + DAY);
        world.turn();
        assert!((sum(&world) - 3.0).abs() < 1e-3, "{}", sum(&world));
    }
}

#[test]
fn the_last_known_state_is_written_when_it_is_due() {
    for jump in JUMPS {
        let mut world = World::new();
        // The first time there is nothing to wait for.
        world.turn();
        assert_eq!(world.engine.last_known.due(), None);
        let config = world.engine.intake.backend_config();
        world.engine.last_known.write_now(&world.engine.plans, &config);
        world.service();
        world.turn();
        let due = world.engine.last_known.due();
        assert!(due.is_some());
        world.set_clock(jump);
        world.turn();
        assert_eq!(world.engine.last_known.due(), due);
        let rest = due.unwrap().duration_since(world.now.lock().unwrap().steady);
        world.pass(rest);
        world.turn();
        assert_eq!(world.engine.last_known.due(), None);
        world.engine.last_known.write_now(&world.engine.plans, &config);
        let state = std::fs::read_to_string(world.folder.path().join("state")).unwrap();
        assert_eq!(state.lines().count(), 2, "{state}");
    }
}

/// Whatever the backend cannot tell, Services go on.
#[test]
fn an_alarm_that_cannot_be_read_ends_nothing_and_is_not_listened_to_for_a_while() {
    let mut world = World::new();
    world.turn();
    world.answers.lock().unwrap().is_confused = true;
    let disturbed = |world: &World| world.answers.lock().unwrap().disturbed;
    // It rings all the time.
    world.alarm.write(1).unwrap();
    for _ in 0..3 {
        // Or nobody would ring the bell.
        world.mailbox.bell.write(1).unwrap();
        let alarmed = world.engine.wait().unwrap();
        assert_eq!(alarmed, disturbed(&world) == 0);
        assert!(!alarmed || world.engine.is_disturbed());
    }
    assert_eq!(disturbed(&world), 1);
    world.service();
    world.turn();
    assert_eq!(world.asked(), 2);
    world.pass(DEAF);
    assert!(world.engine.wait().unwrap());
    world.answers.lock().unwrap().is_confused = false;
    assert!(!world.engine.is_disturbed());
    assert!(world.engine.metrics.text("").contains("keelson_proxy_sync_failures_total 1"));
}
