//! A whole keelson node for one test: its own network namespace, containerd, folders and cgroups; gone with the value.

use std::ffi::OsString;
use std::fs;
use std::net::TcpListener;
use std::os::unix::net::UnixDatagram;
use std::os::unix::process::CommandExt;
use std::path::{Path, PathBuf};
use std::process::{Child, Command, Stdio};
use std::sync::atomic::{AtomicU32, Ordering};
use std::time::{Duration, Instant};

use anyhow::{Context, Result, bail};
use nix::mount::{MsFlags, mount};
use nix::sys::signal::{Signal, kill};
use nix::sys::statfs::{TMPFS_MAGIC, statfs};
use nix::unistd::Pid;

use crate::image::{ImageSpec, write_busybox_archive};

/// The image that every node of the tests has: the machine's busybox.
pub const BUSYBOX: &str = "localhost/test/busybox:1";

/// A hang is a failure, too: nothing that a test waits for may take longer.
pub const PATIENCE: Duration = Duration::from_secs(90);

static COUNTER: AtomicU32 = AtomicU32::new(0);

/// What is unusual about a node.
#[derive(Debug, Clone, Default)]
pub struct Setup {
    /// Flags of `keelson up` beyond the usual ones.
    pub flags: &'static [&'static str],
    /// More environment for keelson's process.
    pub env: Vec<(&'static str, OsString)>,
    /// The node's state lives on a disk of this many bytes, which can be filled.
    pub disk: Option<u64>,
}

/// A running node; dropping it removes it and everything that it made.
pub struct Node {
    name: String,
    api_port: u16,
    child: Option<Child>,
    setup: Setup,
    stopped: bool,
    scratch: tempfile::TempDir,
}

impl Node {
    /// Brings up a node and waits until it is Ready and has the busybox image.
    ///
    /// # Errors
    /// When it does not come up; the error holds the end of its log.
    pub fn start() -> Result<Node> {
        Node::start_with(unique_name("kt"), Setup::default())
    }

    /// Brings up a node without agent and proxy: somebody else runs them, in its network namespace. The names of
    /// everything that it makes begin with `prefix`.
    ///
    /// # Errors
    /// As [`Node::start`].
    pub fn start_control_plane(prefix: &str) -> Result<Node> {
        let name = unique_name(prefix);
        memory_run_dir(&name)?;
        Node::start_with(name, Setup { flags: &["--control-plane-only"], ..Setup::default() })
    }

    /// As [`Node::start`], with more flags for `keelson up`.
    ///
    /// # Errors
    /// As [`Node::start`].
    pub fn start_with_flags(flags: &'static [&'static str]) -> Result<Node> {
        Node::start_with(unique_name("kt"), Setup { flags, ..Setup::default() })
    }

    /// As [`Node::start`], with what is unusual about the node.
    ///
    /// # Errors
    /// As [`Node::start`].
    pub fn start_with_setup(setup: Setup) -> Result<Node> {
        let name = unique_name("kt");
        if let Some(bytes) = setup.disk {
            let folder = Path::new("/var/lib").join(&name);
            memory_disk(&folder, &format!("mode=700,size={bytes}"))?;
        }
        Node::start_with(name, setup)
    }

    fn start_with(name: String, setup: Setup) -> Result<Node> {
        let api_port = TcpListener::bind("127.0.0.1:0")?.local_addr()?.port();
        let scratch = tempfile::tempdir()?;
        let mut node = Node { name, api_port, child: None, setup, stopped: false, scratch };
        node.launch()?;
        let archive = node.scratch.path().join("busybox.tar");
        write_busybox_archive(
            &ImageSpec { name: BUSYBOX.into(), ..ImageSpec::default() },
            &archive,
        )?;
        node.keelson(&["image", "import", &archive.display().to_string()])?;
        Ok(node)
    }

    /// Starts keelson's process and waits for its READY.
    ///
    /// # Errors
    /// As [`Node::start`].
    pub fn launch(&mut self) -> Result<()> {
        let socket = self.scratch.path().join("notify.sock");
        drop(fs::remove_file(&socket));
        let notify = UnixDatagram::bind(&socket)?;
        notify.set_read_timeout(Some(Duration::from_millis(100)))?;
        let log = fs::OpenOptions::new().create(true).append(true).open(self.log_path())?;
        let mut command = Command::new(program("keelson")?);
        command.args([
            "up",
            "--name",
            &self.name,
            "--node-name",
            "node",
            "--api-port",
            &self.api_port.to_string(),
        ]);
        command.args(self.setup.flags).envs(self.setup.env.iter().cloned());
        command.env("NOTIFY_SOCKET", &socket).stdin(Stdio::null());
        command.stdout(log.try_clone()?).stderr(log).process_group(0);
        self.child = Some(command.spawn()?);
        let deadline = Instant::now() + PATIENCE;
        let mut buffer = [0; 4096];
        loop {
            if let Ok(length) = notify.recv(&mut buffer)
                && String::from_utf8_lossy(&buffer[..length]).lines().any(|l| l == "READY=1")
            {
                return Ok(());
            }
            if let Some(status) = self.child.as_mut().and_then(|c| c.try_wait().transpose()) {
                bail!("keelson ended with {}:\n{}", status?, self.log());
            }
            if Instant::now() > deadline {
                bail!("keelson is not ready:\n{}", self.log());
            }
        }
    }

    /// Ends keelson's process with `signal` and waits for its end. Pods, containerd and the log writer stay.
    ///
    /// # Errors
    /// When there is no such process.
    pub fn end_keelson(&mut self, signal: Signal) -> Result<()> {
        let mut child = self.child.take().context("keelson is not running")?;
        kill(Pid::from_raw(child.id().cast_signed()), signal)?;
        child.wait()?;
        Ok(())
    }

    /// keelson's process id.
    pub fn pid(&self) -> Option<u32> {
        self.child.as_ref().map(Child::id)
    }

    /// The name by which everything of this node can be told from that of others.
    pub fn name(&self) -> &str {
        &self.name
    }

    /// The node's sockets, pins and locks.
    pub fn run_dir(&self) -> PathBuf {
        Path::new("/run").join(&self.name)
    }

    /// The node's durable state.
    pub fn state_dir(&self) -> PathBuf {
        Path::new("/var/lib").join(&self.name)
    }

    /// The socket of the node's containerd.
    pub fn containerd_socket(&self) -> PathBuf {
        self.run_dir().join("containerd/containerd.sock")
    }

    /// The administrator's kubeconfig.
    pub fn kubeconfig(&self) -> PathBuf {
        self.state_dir().join("kubeconfig/admin.yaml")
    }

    /// A folder of the test's own.
    pub fn scratch(&self) -> &Path {
        self.scratch.path()
    }

    /// Runs `keelson` with the node's name.
    ///
    /// # Errors
    /// When it fails; with what it wrote.
    pub fn keelson(&self, args: &[&str]) -> Result<String> {
        read(Command::new(program("keelson")?).args(args).args(["--name", &self.name]))
    }

    /// `kubectl` against this node.
    pub fn kubectl_command(&self, args: &[&str]) -> Command {
        let mut command = Command::new("kubectl");
        command
            .arg("--kubeconfig")
            .arg(self.kubeconfig())
            .args(args)
            .current_dir(self.scratch.path());
        // Discovery is cached below HOME by server address; ports are reused between tests.
        command.env("HOME", self.scratch.path());
        command
    }

    /// Runs kubectl and returns what it printed.
    ///
    /// # Errors
    /// When it fails; with what it wrote.
    pub fn kubectl(&self, args: &[&str]) -> Result<String> {
        read(&mut self.kubectl_command(args))
    }

    /// `kubectl apply -f -` of `manifest`.
    ///
    /// # Errors
    /// As kubectl.
    pub fn apply(&self, manifest: &str) -> Result<String> {
        let path = self
            .scratch
            .path()
            .join(format!("manifest-{}.yaml", COUNTER.fetch_add(1, Ordering::Relaxed)));
        fs::write(&path, manifest)?;
        self.kubectl(&["apply", "-f", &path.display().to_string()])
    }

    /// Waits, through a watch, until `condition` (as `kubectl wait --for` takes it) holds. Older kubectls know no
    /// `jsonpath=PATH=VALUE`: that is asked for again and again.
    ///
    /// # Errors
    /// When it does not come true; with the object and the node's log.
    pub fn wait_for(&self, object: &str, condition: &str) -> Result<()> {
        let jsonpath = condition.strip_prefix("jsonpath=").and_then(|c| c.rsplit_once('='));
        let waited = match jsonpath {
            Some((path, value)) => self.wait_for_value(object, path, value),
            None => {
                let timeout = format!("--timeout={}s", PATIENCE.as_secs());
                self.kubectl(&["wait", object, &format!("--for={condition}"), &timeout]).map(drop)
            }
        };
        waited.with_context(|| {
            let described = self.kubectl(&["describe", object]).unwrap_or_default();
            let log = self.log();
            format!("{object} did not become {condition}:\n{described}\nkeelson's log:\n{log}")
        })
    }

    fn wait_for_value(&self, object: &str, path: &str, value: &str) -> Result<()> {
        let deadline = Instant::now() + PATIENCE;
        loop {
            let found = self.kubectl(&["get", object, "-o", &format!("jsonpath={path}")])?;
            if found == value {
                return Ok(());
            }
            if Instant::now() > deadline {
                bail!("{path} is {found:?}");
            }
            std::thread::sleep(Duration::from_millis(100));
        }
    }

    /// A command in the node's network namespace.
    pub fn on_node(&self, program: &str) -> Command {
        self.in_netns(&self.name, program)
    }

    /// A command in the namespace outside the cluster, at the other end of the node's cable.
    pub fn outside(&self, program: &str) -> Command {
        self.in_netns(&format!("{}-outside", self.name), program)
    }

    fn in_netns(&self, name: &str, program: &str) -> Command {
        let mut command = Command::new("nsenter");
        command.arg(format!("--net=/run/netns/{name}")).arg(program);
        command
    }

    /// The end of keelson's log.
    pub fn log(&self) -> String {
        tail(&self.log_path())
    }

    /// Everything that keelson logged.
    pub fn whole_log(&self) -> String {
        fs::read(self.log_path())
            .map(|log| String::from_utf8_lossy(&log).into_owned())
            .unwrap_or_default()
    }

    /// The port of the node's API, on this machine's loopback.
    pub fn api_port(&self) -> u16 {
        self.api_port
    }

    fn log_path(&self) -> PathBuf {
        self.scratch.path().join("keelson.log")
    }

    /// Removes the node and checks that nothing is left of it: what dropping it does, with an error instead of a panic.
    ///
    /// # Errors
    /// What could not be removed.
    pub fn stop(mut self) -> Result<()> {
        self.stopped = true;
        self.down()?;
        crate::leak::nothing_left_of(&self.name)
    }

    fn down(&mut self) -> Result<()> {
        if let Some(mut child) = self.child.take() {
            // Killed, not asked: `keelson down` has to cope with that.
            child.kill()?;
            child.wait()?;
        }
        read(Command::new(program("keelson")?).args(["down", "--name", &self.name])).map(drop)
    }
}

impl Drop for Node {
    fn drop(&mut self) {
        if self.stopped {
            return;
        }
        if std::thread::panicking() {
            eprintln!("the end of keelson's log:\n{}", self.log());
        }
        let result = self.down().and_then(|()| crate::leak::nothing_left_of(&self.name));
        match result {
            Err(error) if std::thread::panicking() => eprintln!("while cleaning up: {error:#}"),
            Err(error) => panic!("{error:#}"),
            Ok(()) => {}
        }
    }
}

fn unique_name(prefix: &str) -> String {
    format!("{prefix}{}-{}", std::process::id(), COUNTER.fetch_add(1, Ordering::Relaxed))
}

/// Makes the node's run folder one in memory, as it is wherever systemd runs, also on a machine whose /run is on a disk.
/// `keelson down` unmounts it with everything else there.
fn memory_run_dir(name: &str) -> Result<()> {
    let folder = Path::new("/run").join(name);
    if statfs("/run")?.filesystem_type() == TMPFS_MAGIC {
        return Ok(fs::create_dir_all(&folder)?);
    }
    memory_disk(&folder, "mode=755")
}

/// Mounts a file system in memory, which `keelson down` unmounts with everything else of the node.
fn memory_disk(folder: &Path, options: &str) -> Result<()> {
    fs::create_dir_all(folder).with_context(|| format!("cannot create {}", folder.display()))?;
    mount(Some("tmpfs"), folder, Some("tmpfs"), MsFlags::empty(), Some(options))
        .with_context(|| format!("cannot mount a tmpfs on {}", folder.display()))
}

/// One of the programs under test.
///
/// # Errors
/// When it was not built.
pub fn program(name: &str) -> Result<PathBuf> {
    let folder = match std::env::var_os("KEELSON_BIN_DIR") {
        Some(folder) => PathBuf::from(folder),
        // target/debug/deps/node-… -> target/debug
        None => std::env::current_exe()?.ancestors().nth(2).context("no target folder")?.to_owned(),
    };
    let path = folder.join(name);
    if !path.is_file() {
        bail!(
            "{} is not built: run the tests through `cargo xtask test --lane node`",
            path.display()
        );
    }
    Ok(path)
}

/// Runs `command` and returns its output.
///
/// # Errors
/// When it cannot be run or ends with another status than 0; with all that it wrote.
pub fn read(command: &mut Command) -> Result<String> {
    let output = command.output().with_context(|| format!("cannot run {command:?}"))?;
    let stdout = String::from_utf8_lossy(&output.stdout).into_owned();
    if !output.status.success() {
        let stderr = String::from_utf8_lossy(&output.stderr);
        bail!("{command:?} ended with {}:\n{}{}", output.status, stdout, stderr.trim());
    }
    Ok(stdout)
}

/// The last lines of a log.
pub fn tail(log: &Path) -> String {
    let text = fs::read_to_string(log).unwrap_or_default();
    let lines: Vec<&str> = text.lines().collect();
    lines[lines.len().saturating_sub(60)..].join("\n")
}

/// Asks until it holds: for what has no watch.
///
/// # Panics
/// With the last answer, when it does not come true.
#[track_caller]
pub fn until(what: &str, mut holds: impl FnMut() -> Result<(), String>) {
    let deadline = Instant::now() + PATIENCE;
    loop {
        match holds() {
            Ok(()) => return,
            Err(last) => assert!(Instant::now() < deadline, "{what}: {last}"),
        }
        std::thread::sleep(Duration::from_millis(100));
    }
}
