//! Images that nobody uses: removed by command, or when their disk is too full.

use std::process::Command;

use keelson_tests::image::{ImageSpec, write_busybox_archive};
use keelson_tests::node::{BUSYBOX, Node, read, until};
use nix::sys::signal::Signal;

/// An image of its own with `bytes` that no other has.
fn import(node: &Node, name: &str, bytes: usize) -> String {
    let archive = node.scratch().join("import.tar");
    let name = format!("localhost/test/{name}:1");
    let pad = name.bytes().cycle().take(bytes).collect();
    let files = [("pad".to_owned(), pad)].into();
    let spec = ImageSpec { name: name.clone(), files, ..ImageSpec::default() };
    write_busybox_archive(&spec, &archive).unwrap();
    node.keelson(&["image", "import", &archive.display().to_string()]).unwrap();
    name
}

fn images(node: &Node) -> String {
    node.keelson(&["image", "list"]).unwrap()
}

fn ctr(node: &Node, args: &[&str]) -> String {
    let mut ctr = Command::new("ctr");
    ctr.arg("--address").arg(node.containerd_socket()).args(["--namespace", "keelson"]);
    read(ctr.args(args)).unwrap()
}

/// What containerd holds for images: blobs, and snapshots that containers can start from.
fn held(node: &Node) -> (usize, usize) {
    let snapshots = ctr(node, &["snapshots", "list"]);
    let committed = snapshots.lines().filter(|line| line.contains("Committed")).count();
    (ctr(node, &["content", "list", "-q"]).lines().count(), committed)
}

fn pod(name: &str, image: &str, command: &str) -> String {
    format!(
        r#"
apiVersion: v1
kind: Pod
metadata: {{ name: {name} }}
spec:
  terminationGracePeriodSeconds: 0
  restartPolicy: Never
  containers: [{{ name: main, image: "{image}", command: ["sh", "-c", "{command}"] }}]
"#
    )
}

#[test]
fn rm_takes_names_and_the_last_tag_takes_the_image_and_prune_what_nobody_uses() {
    let node = Node::start().unwrap();
    let before = held(&node);
    let app = import(&node, "app", 100_000);
    assert_eq!(held(&node), (before.0 + 3, before.1 + 1));
    let other = app.replace("app:1", "other:2");
    ctr(&node, &["images", "tag", &app, &other]);

    assert_eq!(node.keelson(&["image", "rm", &app]).unwrap(), format!("{app}\n"));
    assert_eq!(held(&node), (before.0 + 3, before.1 + 1));
    let removed = node.keelson(&["image", "rm", &other]).unwrap();
    assert!(removed.starts_with(&format!("{other}\nsha256:")), "{removed}");
    assert_eq!(held(&node), before);

    let error = node.keelson(&["image", "rm", &app, "x y"]).unwrap_err().to_string();
    assert!(error.contains(&format!("image {app} does not exist")), "{error}");
    assert!(error.contains("x y"), "{error}");

    let used = import(&node, "used", 1000);
    let unused = import(&node, "unused", 1000);
    node.apply(&pod("user", &used, "sleep 1000")).unwrap();
    node.wait_for("pod/user", "condition=Ready").unwrap();
    let error = node.keelson(&["image", "rm", &used]).unwrap_err().to_string();
    assert!(error.contains("is used by container main of pod default/user"), "{error}");
    let pruned = node.keelson(&["image", "prune"]).unwrap();
    assert!(pruned.contains(&unused) && pruned.contains(BUSYBOX), "{pruned}");
    assert!(pruned.contains(" MiB freed\n") && !pruned.contains(&used), "{pruned}");
    let left = images(&node);
    assert!(left.contains(&used) && left.lines().count() == 1, "{left}");

    // Without its names it runs on, and there is nothing to start the next one from.
    node.keelson(&["image", "rm", "--force", &used]).unwrap();
    assert_eq!(node.kubectl(&["exec", "user", "--", "echo", "alive"]).unwrap(), "alive\n");
    node.apply(&pod("next", &used, "true")).unwrap();
    let waiting = "jsonpath={.status.containerStatuses[0].state.waiting.reason}=ImagePullBackOff";
    node.wait_for("pod/next", waiting).unwrap();
}

#[test]
fn a_full_disk_costs_the_images_that_no_container_was_made_from() {
    let mut node = Node::start_with_flags(&[
        "--image-gc-high-threshold=1",
        "--image-gc-low-threshold=0",
        "--minimum-image-ttl-duration=1s",
    ])
    .unwrap();
    let before = held(&node);
    let unused = import(&node, "unused", 1_000_000);
    let pinned = import(&node, "pinned", 1000);
    ctr(&node, &["images", "label", &pinned, "io.cri-containerd.pinned=pinned"]);
    let ended = import(&node, "ended", 1000);
    for (name, image, command) in [("runs", BUSYBOX, "sleep 1000"), ("ended", &ended, "true")] {
        node.apply(&pod(name, image, command)).unwrap();
    }
    node.wait_for("pod/runs", "condition=Ready").unwrap();
    node.wait_for("pod/ended", "jsonpath={.status.phase}=Succeeded").unwrap();
    // The agent looks when it starts, and again as soon as the unused one is old enough.
    node.end_keelson(Signal::SIGKILL).unwrap();
    node.launch().unwrap();
    until("the unused image is gone", || {
        let images = images(&node);
        if images.contains(&unused) { Err(images) } else { Ok(()) }
    });
    until("its space is free", || {
        let now = held(&node);
        if now == (before.0 + 6, before.1 + 2) {
            Ok(())
        } else {
            Err(format!("{now:?} {before:?}"))
        }
    });
    let left = images(&node);
    for image in [BUSYBOX, &pinned, &ended] {
        assert!(left.contains(image), "{image}: {left}");
    }
    // That is not enough, and the disk's owner is told.
    until("events tell", || {
        let events = node
            .kubectl(&["get", "events", "--field-selector", "involvedObject.kind=Node"])
            .unwrap();
        let parts = ["FreeDiskSpaceFailed", "ImageGCFailed", "Failed to free sufficient space by"];
        if parts.iter().all(|part| events.contains(part)) { Ok(()) } else { Err(events) }
    });
    node.wait_for("pod/runs", "condition=Ready").unwrap();
}

#[test]
fn thresholds_that_do_not_fit_are_refused() {
    let node = Node::start_with_flags(&["--image-gc-low-threshold=99"]);
    let error = format!("{:#}", node.err().unwrap());
    assert!(
        error.contains("imageGCLowThresholdPercent (--image-gc-low-threshold): 99 is not less"),
        "{error}"
    );
}
