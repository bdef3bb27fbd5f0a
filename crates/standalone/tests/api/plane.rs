//! Control planes for tests: in this process, or in one that can be killed.

use std::io::{BufRead as _, BufReader};
use std::net::{Ipv4Addr, TcpListener};
use std::path::{Path, PathBuf};
use std::process::{Child, Command, Stdio};

use keelson_standalone::{ControlPlane, StandaloneConfig};
use tempfile::TempDir;

use crate::client::Client;

/// A control plane without controllers in this process.
pub(crate) struct Plane {
    pub(crate) plane: ControlPlane,
    pub(crate) client: Client,
    pub(crate) dir: TempDir,
}

pub(crate) async fn start() -> Plane {
    start_with(false).await
}

pub(crate) async fn start_with(controllers: bool) -> Plane {
    let dir = tempfile::tempdir().unwrap();
    let plane = keelson_standalone::start(config(dir.path(), controllers)).await.unwrap();
    let client = Client::from_kubeconfig(&plane.admin_kubeconfig());
    Plane { plane, client, dir }
}

fn config(dir: &Path, controllers: bool) -> StandaloneConfig {
    let listener = TcpListener::bind((Ipv4Addr::LOCALHOST, 0)).unwrap();
    let mut config = StandaloneConfig::new(dir.to_owned(), vec![listener]);
    config.controllers = controllers;
    config
}

/// A control plane in a process of its own.
pub(crate) struct Process {
    child: Child,
    pub(crate) kubeconfig: PathBuf,
}

const CHILD: &str = "KEELSON_TEST_CHILD_DATA_DIR";

impl Process {
    /// Starts this test binary again as a server.
    pub(crate) fn start(dir: &Path) -> Self {
        Self::run(Command::new(std::env::current_exe().unwrap()), dir)
    }

    /// The same, but no file of it can grow beyond `kib` KiB: as if the disk were full then.
    pub(crate) fn start_on_small_disk(dir: &Path, kib: u32) -> Self {
        let mut shell = Command::new("bash");
        let script = format!("trap '' XFSZ; ulimit -S -f {kib}; exec \"$0\" \"$@\"");
        shell.arg("-c").arg(script).arg(std::env::current_exe().unwrap());
        Self::run(shell, dir)
    }

    fn run(mut command: Command, dir: &Path) -> Self {
        let mut child = command
            .args(["plane::child", "--exact", "--ignored", "--nocapture"])
            .env(CHILD, dir)
            .stdout(Stdio::piped())
            .spawn()
            .unwrap();
        let lines = BufReader::new(child.stdout.take().unwrap()).lines();
        let serving = lines.map_while(Result::ok).find(|line| line.contains("serving"));
        assert!(serving.is_some(), "the server did not start");
        Self { child, kubeconfig: dir.join("kubeconfig/admin.yaml") }
    }

    /// Ends what [`Self::start_on_small_disk`] began.
    pub(crate) fn give_space(&self) {
        let process = self.child.id().to_string();
        let given = Command::new("prlimit")
            .args(["--pid", &process, "--fsize=unlimited:"])
            .status()
            .unwrap();
        assert!(given.success());
    }

    pub(crate) fn kill(&mut self) {
        self.child.kill().unwrap();
        self.child.wait().unwrap();
    }
}

impl Drop for Process {
    fn drop(&mut self) {
        drop(self.child.kill());
        drop(self.child.wait());
    }
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
#[ignore = "the server process of other tests"]
async fn child() {
    let Ok(dir) = std::env::var(CHILD) else { return };
    let _plane = keelson_standalone::start(config(Path::new(&dir), false)).await.unwrap();
    println!("serving");
    std::future::pending::<()>().await;
}
