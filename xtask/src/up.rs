//! `cargo xtask up`: from a fresh machine to a web site behind a Service.

use std::fs::{self, File};
use std::os::unix::net::UnixDatagram;
use std::os::unix::process::CommandExt;
use std::path::{Path, PathBuf};
use std::process::{Child, Command};
use std::time::{Duration, Instant};

use anyhow::{Context, Result, bail};
use keelson_tests::image::{ImageSpec, write_busybox_archive};

use crate::build::{self, Profile};
use crate::{install, shell};

/// How long the node may take to come up before we give up on it.
const START_LIMIT: Duration = Duration::from_secs(120);

#[derive(clap::Args)]
pub(crate) struct UpArgs {
    /// Run the node on the machine's own network instead of a network namespace of its own
    #[arg(long)]
    host_network: bool,
    /// Port of the Kubernetes API on 127.0.0.1
    #[arg(long, default_value_t = 6443)]
    api_port: u16,
}

pub(crate) fn run(args: &UpArgs) -> Result<()> {
    if !nix::unistd::geteuid().is_root() {
        bail!("a node needs root (namespaces, cgroups, mounts): run `sudo cargo xtask up`");
    }
    install::for_up()?;
    step("Building keelson");
    let bin = build::node_programs(Profile::Release)?;
    step("Starting the node");
    start_node(&bin, args)?;
    let kubectl = Kubectl { kubeconfig: PathBuf::from("/var/lib/keelson/kubeconfig/admin.yaml") };
    step("Making the example's image from the machine's own busybox");
    let image = build::target_dir().join("web-image.tar");
    let spec = ImageSpec { name: "localhost/keelson/web:1".into(), ..ImageSpec::default() };
    write_busybox_archive(&spec, &image)?;
    shell::run(Command::new(bin.join("keelson")).args(["image", "import"]).arg(&image))?;
    step("Applying docs/examples/web.yaml");
    kubectl.run(&["apply", "-f", "docs/examples/web.yaml", "-f", "docs/examples/visitor.yaml"])?;
    kubectl.run(&["rollout", "status", "deployment/web", "--timeout=90s"])?;
    kubectl.run(&["wait", "--for=condition=Ready", "pod/visitor", "--timeout=60s"])?;
    for what in ["nodes", "pods", "services"] {
        println!();
        kubectl.run(&["get", what, "-o", "wide"])?;
    }
    show_page(&kubectl, args)?;
    say_how_to_go_on(&bin, &kubectl);
    Ok(())
}

struct Kubectl {
    kubeconfig: PathBuf,
}

impl Kubectl {
    fn command(&self, args: &[&str]) -> Command {
        let mut kubectl = Command::new("kubectl");
        kubectl.current_dir(shell::root()).arg("--kubeconfig").arg(&self.kubeconfig).args(args);
        kubectl
    }

    fn run(&self, args: &[&str]) -> Result<()> {
        shell::run(&mut self.command(args))
    }

    fn read(&self, args: &[&str]) -> Result<String> {
        shell::read(&mut self.command(args))
    }
}

fn step(what: &str) {
    println!("\n==> {what}");
}

/// Starts `keelson up` in the background and follows what it reports, the way systemd would.
fn start_node(bin: &Path, args: &UpArgs) -> Result<()> {
    let notify_path = build::target_dir().join(format!("notify-{}.sock", std::process::id()));
    let notify = UnixDatagram::bind(&notify_path).context("cannot make a notification socket")?;
    notify.set_read_timeout(Some(Duration::from_millis(200)))?;
    let log_path = PathBuf::from("/run/keelson/up.log");
    fs::create_dir_all("/run/keelson")?;
    let log = File::create(&log_path)?;
    let mut command = Command::new(bin.join("keelson"));
    command.arg("up").args(["--api-port", &args.api_port.to_string()]);
    if args.host_network {
        command.arg("--host-network");
    }
    command.env("NOTIFY_SOCKET", &notify_path).stdin(std::process::Stdio::null());
    command.stdout(log.try_clone()?).stderr(log).process_group(0);
    let mut child =
        command.spawn().with_context(|| format!("cannot run {}", shell::line(&command)))?;
    let result = follow(&mut child, &notify, &log_path);
    fs::remove_file(&notify_path)?;
    result
}

fn follow(child: &mut Child, notify: &UnixDatagram, log: &Path) -> Result<()> {
    let started = Instant::now();
    let mut buffer = [0; 4096];
    loop {
        if let Ok(length) = notify.recv(&mut buffer) {
            let text = String::from_utf8_lossy(&buffer[..length]);
            if let Some(status) = text.lines().find_map(|l| l.strip_prefix("STATUS=")) {
                println!("    {status}");
            }
            if text.lines().any(|l| l == "READY=1") {
                return Ok(());
            }
        }
        if let Some(status) = child.try_wait()? {
            bail!("the node ended with {status}:\n{}", tail(log));
        }
        if started.elapsed() > START_LIMIT {
            bail!(
                "the node is not ready after {START_LIMIT:?}; the end of {}:\n{}",
                log.display(),
                tail(log)
            );
        }
    }
}

fn tail(log: &Path) -> String {
    let text = fs::read_to_string(log).unwrap_or_default();
    let lines: Vec<&str> = text.lines().collect();
    lines[lines.len().saturating_sub(15)..].join("\n")
}

/// Fetches the page the four ways that matter: ClusterIP and NodePort, from another pod and from the node.
fn show_page(kubectl: &Kubectl, args: &UpArgs) -> Result<()> {
    let cluster_ip =
        kubectl.read(&["get", "service", "web", "-o", "jsonpath={.spec.clusterIP}"])?;
    let node_port =
        kubectl.read(&["get", "service", "web", "-o", "jsonpath={.spec.ports[0].nodePort}"])?;
    let node_ip = kubectl.read(&[
        "get",
        "nodes",
        "-o",
        r#"jsonpath={.items[0].status.addresses[?(@.type=="InternalIP")].address}"#,
    ])?;
    let node_ip = node_ip.split_whitespace().next().context("the node has no InternalIP")?;
    let ways =
        [("ClusterIP", cluster_ip.as_str(), "80"), ("NodePort", node_ip, node_port.as_str())];
    for (name, host, port) in ways {
        let fetch = fetch_command(host, port);
        step(&format!("{name} from another pod: http://{host}:{port}/"));
        print_page(&kubectl.read(&["exec", "visitor", "--", "sh", "-c", &fetch])?)?;
        step(&format!("{name} from the node: http://{host}:{port}/"));
        let mut node = on_node(args);
        node.args(["busybox", "sh", "-c", &fetch]);
        print_page(&shell::read(&mut node)?)?;
    }
    Ok(())
}

/// Debian's static busybox has a wget that crashes on answers; its nc does not.
fn fetch_command(host: &str, port: &str) -> String {
    format!(r"printf 'GET / HTTP/1.0\r\n\r\n' | busybox nc -w 5 {host} {port}")
}

/// Shows the page without the header lines above it.
fn print_page(answer: &str) -> Result<()> {
    let page = answer.split("\r\n\r\n").nth(1).filter(|_| answer.contains("200 OK"));
    let page = page.with_context(|| format!("no page was served, but: {answer}"))?;
    println!("{}", page.trim_end());
    Ok(())
}

/// A command prefix that runs in the node's network namespace.
fn on_node(args: &UpArgs) -> Command {
    let mut command = Command::new("nsenter");
    command.arg(if args.host_network {
        "--net=/proc/self/ns/net"
    } else {
        "--net=/run/netns/keelson"
    });
    command
}

fn say_how_to_go_on(bin: &Path, kubectl: &Kubectl) {
    println!("\n==> The node is yours");
    println!("    export KUBECONFIG={}", kubectl.kubeconfig.display());
    println!("    kubectl get pods -o wide");
    println!("    kubectl logs -l app=web            # and: kubectl exec -it visitor -- sh");
    println!("    {} image import my-image.tar", bin.join("keelson").display());
    println!("    log of the node: /run/keelson/up.log");
    println!("    cargo xtask down                   # stops it and leaves nothing behind");
}
