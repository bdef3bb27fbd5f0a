//! Images from a real registry.

use keelson_tests::image::{ImageSpec, write_busybox_archive};
use keelson_tests::node::Node;
use keelson_tests::registry::{PASSWORD, Registry, USER};

fn pod(name: &str, image: &str, policy: &str, secret: &str) -> String {
    format!(
        r#"
apiVersion: v1
kind: Pod
metadata: {{ name: {name} }}
spec:
  terminationGracePeriodSeconds: 0
  imagePullSecrets: [{{ name: {secret} }}]
  containers:
    - {{ name: main, image: "{image}", imagePullPolicy: {policy}, command: ["sleep", "1000"] }}
"#
    )
}

#[test]
fn images_come_by_tag_and_digest_with_the_secret_and_not_without() {
    let node = Node::start().unwrap();
    let registry = Registry::start(node.scratch()).unwrap();
    let archive = node.scratch().join("app.tar");
    let spec =
        ImageSpec { name: "app:1".into(), env: vec!["WHO=image".into()], ..ImageSpec::default() };
    write_busybox_archive(&spec, &archive).unwrap();
    let digest = registry.push(&archive, "team/app:1").unwrap();
    let server = format!("--docker-server={}", registry.host());
    let (user, password) =
        (format!("--docker-username={USER}"), format!("--docker-password={PASSWORD}"));
    node.kubectl(&["create", "secret", "docker-registry", "registry", &server, &user, &password])
        .unwrap();

    let by_tag = format!("{}/team/app:1", registry.host());
    node.apply(&pod("refused", &by_tag, "Always", "missing")).unwrap();
    node.wait_for(
        "pod/refused",
        "jsonpath={.status.containerStatuses[0].state.waiting.reason}=ImagePullBackOff",
    )
    .unwrap();
    let events = node
        .kubectl(&["get", "events", "--field-selector", "involvedObject.name=refused"])
        .unwrap();
    assert!(events.contains(&format!("Failed to pull image \"{by_tag}\"")), "{events}");

    node.apply(&pod("tag", &by_tag, "IfNotPresent", "registry")).unwrap();
    node.wait_for("pod/tag", "condition=Ready").unwrap();
    let image_id = node
        .kubectl(&["get", "pod", "tag", "-o", "jsonpath={.status.containerStatuses[0].imageID}"])
        .unwrap();
    assert_eq!(image_id, format!("{}/team/app@{digest}", registry.host()));
    assert_eq!(node.kubectl(&["exec", "tag", "--", "sh", "-c", "echo $WHO"]).unwrap(), "image\n");

    node.apply(&pod(
        "digest",
        &format!("{}/team/app@{digest}", registry.host()),
        "Always",
        "registry",
    ))
    .unwrap();
    node.wait_for("pod/digest", "condition=Ready").unwrap();

    node.apply(&pod("never", &format!("{}/team/app:2", registry.host()), "Never", "registry"))
        .unwrap();
    node.wait_for(
        "pod/never",
        "jsonpath={.status.containerStatuses[0].state.waiting.reason}=ErrImageNeverPull",
    )
    .unwrap();
}
