//! `kubectl attach` and `kubectl run -i`, over both protocols.

mod session;

use std::process::Command;

use keelson_tests::leak;
use keelson_tests::node::{BUSYBOX, Node, read, until};
use nix::sys::signal::{Signal, kill};
use nix::unistd::Pid;

use session::Kubectl;

/// Repeats every line that it gets, to both outputs.
const ECHO: &str = "echo before; while read line; do echo got $line; echo err $line >&2; done; \
                    echo over; until [ -e /end ]; do sleep 0.1; done";

/// A pod whose container has the `flags` (`stdin`, `stdinOnce`, `tty`) and runs `script`.
fn start(node: &Node, name: &str, flags: &[&str], script: &str) {
    let flags: String = flags.iter().map(|flag| format!("{flag}: true, ")).collect();
    node.apply(&format!(
        r#"
apiVersion: v1
kind: Pod
metadata: {{ name: {name} }}
spec:
  terminationGracePeriodSeconds: 0
  restartPolicy: Never
  containers: [{{ name: main, image: "{BUSYBOX}", {flags} command: ["sh", "-c", {script:?}] }}]
"#
    ))
    .unwrap();
    node.wait_for(&format!("pod/{name}"), "condition=Ready").unwrap();
}

fn logs(node: &Node, name: &str) -> String {
    node.kubectl(&["logs", name]).unwrap()
}

#[track_caller]
fn until_logged(node: &Node, name: &str, text: &str) {
    until("it is in the log", || {
        let log = logs(node, name);
        if log.contains(text) { Ok(()) } else { Err(log) }
    });
}

/// As long as nothing happens to a container, this stays.
fn identity(node: &Node, name: &str) -> String {
    let path =
        "jsonpath={.status.containerStatuses[0].containerID} {.status.containerStatuses[0].state}";
    node.kubectl(&["get", "pod", name, "-o", path]).unwrap()
}

#[test]
fn attach_shows_what_is_printed_from_now_on_to_everybody_and_the_log_has_it_all() {
    let node = Node::start().unwrap();
    start(&node, "echo", &["stdin"], ECHO);
    until_logged(&node, "echo", "before\n");
    let before = identity(&node, "echo");
    for (round, kubectl) in Kubectl::all().into_iter().enumerate() {
        let attach = ["attach", "-i", "echo"];
        let mut first = kubectl.talk(&node, &attach);
        first.say(&format!("one {round}\n"));
        assert_eq!(first.hear(&format!("got one {round}\n")), "", "{kubectl:?}");
        let mut second = kubectl.talk(&node, &attach);
        second.say(&format!("two {round}\n"));
        assert_eq!(second.hear(&format!("got two {round}\n")), "");
        first.hear(&format!("got two {round}\n"));
        until_logged(&node, "echo", &format!("err two {round}\n"));
        // The end of the input is the end of the session, not of the container's input.
        first.hang_up();
        let (code, _, errors) = first.end();
        assert_eq!(code, Some(0), "{errors}");
        assert!(errors.contains(&format!("err one {round}\nerr two {round}\n")), "{errors}");
        second.say(&format!("three {round}\n"));
        second.hear(&format!("got three {round}\n"));
        second.signal(Signal::SIGKILL);
        drop(second);
        until_logged(&node, "echo", &format!("err three {round}\n"));
    }
    let lines = |start: &str| {
        let log = logs(&node, "echo");
        log.lines().filter(|line| line.starts_with(start)).count()
    };
    let rounds = Kubectl::all().len();
    assert_eq!([lines("got "), lines("err "), lines("")], [3 * rounds, 3 * rounds, 6 * rounds + 1]);
    assert_eq!(identity(&node, "echo"), before);
    node.kubectl(&["delete", "pod", "echo"]).unwrap();
    leak::no_pods_left(&node);
}

#[test]
fn much_output_arrives_whole_and_a_suspended_kubectl_does_not_hold_the_container_up() {
    let node = Node::start().unwrap();
    // More than all the buffers on the way can hold.
    let script = "line=$(seq -s - 1 300); \
                  while read word; do yes $line | head -c 40000000; echo; echo done $word; done";
    start(&node, "much", &["stdin"], script);
    let attach = || Kubectl::usual().talk(&node, &["attach", "-i", "much"]);
    let mut suspended = attach();
    suspended.say("one\n");
    let all = suspended.hear("\ndone one\n");
    assert_eq!(all.len(), 40_000_000);
    let line: Vec<String> = (1..=300).map(|number| number.to_string()).collect();
    let line = line.join("-");
    assert!(all.lines().all(|got| line.starts_with(got)));
    suspended.signal(Signal::SIGSTOP);
    let mut other = attach();
    other.say("two\n");
    assert_eq!(other.hear("\ndone two\n"), all);
    until("the log has it", || {
        let last = node.kubectl(&["logs", "much", "--tail=1"]).unwrap();
        if last == "done two\n" { Ok(()) } else { Err(last) }
    });
    suspended.signal(Signal::SIGCONT);
    let (code, _, errors) = suspended.end();
    assert!(errors.contains("printed more than was taken from it"), "{errors}");
    assert_eq!(code, Some(1));
}

#[test]
fn run_passes_input_on_and_ends_with_the_containers_exit_code() {
    let node = Node::start().unwrap();
    for kubectl in Kubectl::all() {
        let run = ["run", "-i", "--rm", "--restart=Never", "--image", BUSYBOX, "once", "--"];
        let script = ["sh", "-c", "cat; echo over; exit 3"];
        let mut session = kubectl.talk(&node, &[&run[..], &script].concat());
        session.say("hello\n");
        session.hear("hello\n");
        // kubectl asks for stdinOnce.
        session.hang_up();
        let (code, output, errors) = session.end();
        assert!(output.starts_with("over\n"), "{kubectl:?}: {output} {errors}");
        assert!(errors.contains("once terminated (Error)"), "{errors}");
        assert_eq!(code, Some(3), "{errors}");
    }
    leak::no_pods_left(&node);
}

#[test]
fn with_stdin_once_the_first_who_brings_input_is_the_last() {
    let node = Node::start().unwrap();
    // It says all the time that it goes on: so one knows that a session has begun.
    let goes_on = format!("while sleep 0.1; do echo waiting; done & {ECHO}");
    start(&node, "once", &["stdin", "stdinOnce"], &goes_on);
    let attach = || Kubectl::usual().talk(&node, &["attach", "-i", "once"]);
    let mut watcher = Kubectl::usual().talk(&node, &["attach", "once"]);
    watcher.hear("waiting\n");
    let mut first = attach();
    first.say("hello\n");
    first.hear("got hello\n");
    // Killed, not asked to go: that is the end of its input, too.
    first.signal(Signal::SIGKILL);
    drop(first);
    until_logged(&node, "once", "over\n");
    let mut late = attach();
    late.say("anybody?\n");
    late.hear("waiting\n");
    // What it says goes nowhere; it sees the container's end all the same.
    node.kubectl(&["exec", "once", "--", "touch", "/end"]).unwrap();
    node.wait_for("pod/once", "jsonpath={.status.phase}=Succeeded").unwrap();
    let (code, output, errors) = late.end();
    assert_eq!(code, Some(0), "{errors}");
    assert_eq!(output.replace("waiting\n", ""), "");
    watcher.hear("over\n");
    let (code, _, errors) = watcher.end();
    assert_eq!(code, Some(0), "{errors}");
}

#[test]
fn a_terminal_is_resized_left_and_taken_up_again() {
    let node = Node::start().unwrap();
    for kubectl in Kubectl::all() {
        let run = ["run", "-it", "--image", BUSYBOX, "shell", "--", "sh"];
        let mut session = kubectl.talk_on_terminal(&node, &run);
        session.hear("/ # ");
        // The size comes after the session has begun.
        let wait = |size: &str| {
            format!("until stty size | grep '{size}'; do sleep 0.1; done; echo is $((6 * 7))\n")
        };
        session.say(&wait("24 80"));
        session.hear("is 42\r\n");
        session.resize(33, 99);
        session.say(&wait("33 99"));
        session.hear("is 42\r\n");
        // A closed window, not the end of the shell.
        session.signal(Signal::SIGKILL);
        drop(session);
        let mut session = kubectl.talk_on_terminal(&node, &["attach", "-it", "shell"]);
        session.say("echo still $((3 * 4))\n");
        session.hear("still 12\r\n");
        session.say("exit 4\n");
        let (code, output, _) = session.end();
        assert!(output.contains("Session ended, resume using "), "{kubectl:?}: {output}");
        assert_eq!(code, Some(0), "{output}");
        let code = "{.status.containerStatuses[0].lastState.terminated.exitCode}";
        node.wait_for("pod/shell", &format!("jsonpath={code}=4")).unwrap();
        node.kubectl(&["delete", "pod", "shell", "--grace-period=1"]).unwrap();
    }
    leak::no_pods_left(&node);
}

#[test]
fn debug_brings_a_shell_beside_a_container_that_has_none() {
    let node = Node::start().unwrap();
    start(&node, "web", &[], "exec sleep 1000");
    let debug = ["debug", "-it", "web", "--image", BUSYBOX, "--target=main", "-c", "aside", "--"];
    let mut session = Kubectl::usual().talk_on_terminal(&node, &[&debug[..], &["sh"]].concat());
    session.hear("/ # ");
    session.say("ps\n");
    session.hear("sleep 1000\r\n");
    session.say("exit 6\n");
    session.end();
    let code = "{.status.ephemeralContainerStatuses[0].state.terminated.exitCode}";
    node.wait_for("pod/web", &format!("jsonpath={code}=6")).unwrap();
    node.kubectl(&["delete", "pod", "web"]).unwrap();
    leak::no_pods_left(&node);
}

fn ticks(log: &str) -> Vec<usize> {
    let ticks = log.lines().filter_map(|line| line.strip_prefix("tick "));
    ticks.map(|tick| tick.parse().unwrap()).collect()
}

#[test]
fn a_killed_agent_costs_the_session_and_the_container_notices_nothing() {
    let mut node = Node::start().unwrap();
    let script = "(while sleep 0.05; do echo tick $((i += 1)); done) & \
                  while read line; do echo got $line; done; echo over";
    for (name, flags) in [("open", &["stdin"][..]), ("once", &["stdin", "stdinOnce"])] {
        start(&node, name, flags, script);
    }
    let [open, once] = ["open", "once"].map(|name| identity(&node, name));
    let kubectl = Kubectl::usual();
    for (round, signal) in [Signal::SIGKILL, Signal::SIGTERM].into_iter().enumerate() {
        let mut sessions = Vec::new();
        for name in ["open", "once"] {
            let mut session = kubectl.talk(&node, &["attach", "-i", name]);
            session.say(&format!("{round}\n"));
            session.hear(&format!("got {round}\n"));
            session.hear("tick ");
            sessions.push(session);
        }
        node.end_keelson(signal).unwrap();
        for session in sessions {
            session.end();
        }
        node.launch().unwrap();
    }
    let pattern = format!("keelson logd --run-dir {}", node.run_dir().display());
    for (name, before) in [("open", open), ("once", once)] {
        let mut session = kubectl.talk(&node, &["attach", "-i", name]);
        session.say("again\n");
        session.hear("got again\n");
        // The log writer may go, too: the next one reads on where it stopped.
        let pid = read(Command::new("pgrep").args(["-f", &pattern])).unwrap();
        kill(Pid::from_raw(pid.trim().parse().unwrap()), Signal::SIGKILL).unwrap();
        let newest = ticks(&logs(&node, name)).len();
        session.hear(&format!("tick {}\n", newest + 40));
        session.say("and again\n");
        session.hear("got and again\n");
        let log = logs(&node, name);
        assert!(!log.contains("over"), "{log}");
        let ticks = ticks(&log);
        assert!(ticks.iter().copied().eq(1..=ticks.len()), "{log}");
        assert_eq!(identity(&node, name), before);
    }
}

#[test]
fn who_cannot_be_attached_to_and_who_takes_no_input() {
    let node = Node::start().unwrap();
    node.apply(&format!(
        r#"
apiVersion: v1
kind: Pod
metadata: {{ name: two }}
spec:
  terminationGracePeriodSeconds: 0
  restartPolicy: Never
  containers:
    - {{ name: done, image: "{BUSYBOX}", command: ["true"] }}
    - name: deaf
      image: "{BUSYBOX}"
      command: ["sh", "-c", "cat; echo nothing came; while sleep 0.1; do echo tick; done"]
"#
    ))
    .unwrap();
    let done = "jsonpath={.status.containerStatuses[1].state.terminated.reason}=Completed";
    node.wait_for("pod/two", done).unwrap();
    let running = "jsonpath={.status.containerStatuses[0].ready}=true";
    node.wait_for("pod/two", running).unwrap();
    for kubectl in Kubectl::all() {
        let session = kubectl.talk(&node, &["attach", "two", "-c", "done"]);
        let (code, _, errors) = session.end();
        assert!(errors.contains("container done not found in pod two_default"), "{errors}");
        assert_eq!(code, Some(1));
        let mut session = kubectl.talk(&node, &["attach", "-i", "two", "-c", "deaf"]);
        session.say("hello?\n");
        session.hang_up();
        session.hear("tick\ntick\n");
    }
    assert!(!node.kubectl(&["logs", "two", "-c", "deaf"]).unwrap().contains("hello"));
    let refused = node.kubectl(&["attach", "nobody"]).unwrap_err().to_string();
    assert!(refused.contains("not found"), "{refused}");
}
