//! Pods that try to write where they may not, and to confuse or exhaust the agent.

use keelson_tests::node::{BUSYBOX, Node, until};

use crate::yaml_text;

/// Keys of the ConfigMap: each is a moment in which the agent writes below a folder that the container sees.
const KEYS: usize = 30;

/// The hostile pods, which run until [`Hostile::end`].
pub(crate) struct Hostile;

pub(crate) fn start(node: &Node) -> Hostile {
    node.apply(&config_map(0)).unwrap();
    node.kubectl(&["create", "secret", "generic", "key", "--from-literal=password=s3cret"])
        .unwrap();
    let pods = [writer(), names(), probes(), floods(), last_words(), noisy_probe()];
    node.apply(&pods.concat()).unwrap();
    node.wait_for("pod/writer", "condition=Ready").unwrap();
    node.wait_for("pod/names", "condition=Ready").unwrap();
    Hostile
}

/// A changed ConfigMap arrives in the volume of the container that tries to swap the volume's folders.
pub(crate) fn config_changes_reach(node: &Node) {
    for version in 1..=3 {
        node.apply(&config_map(version)).unwrap();
        until("the change arrives in the hostile container", || {
            let content = node.kubectl(&["exec", "writer", "--", "cat", "/cm/k0"]);
            let content = content.map_err(|error| format!("{error:#}"))?;
            if content == format!("version {version}") { Ok(()) } else { Err(content) }
        });
    }
}

impl Hostile {
    pub(crate) fn end(self, node: &Node) {
        let writer = node.kubectl(&["logs", "writer"]).unwrap();
        assert_eq!(writer, "tried\n", "the container wrote into a volume of the API's objects");
        let message = "jsonpath={.status.containerStatuses[0].state.terminated.message}";
        let message = node.kubectl(&["get", "pod", "words", "-o", message]).unwrap();
        assert!(!message.is_empty() && message.len() <= 4096, "{} bytes", message.len());
        node.kubectl(&["delete", "pods", "-l", "kind=hostile", "--wait"]).unwrap();
    }
}

fn config_map(version: u32) -> String {
    let mut text = "apiVersion: v1\nkind: ConfigMap\nmetadata: { name: keys }\ndata:\n".to_owned();
    for key in 0..KEYS {
        text += &format!("  k{key}: version {version}\n");
    }
    text
}

/// Tries to write, to link and to swap the folders of every kind of volume that the agent writes.
fn writer() -> String {
    let script = r#"
      for d in /cm /key /down /mixed; do
        touch $d/x 2>/dev/null && echo "wrote into $d"
        rm -f $d/..data 2>/dev/null && echo "removed the link of $d"
        ln -sfn / $d/..data 2>/dev/null && echo "linked $d"
        mount -o remount,rw $d 2>/dev/null && echo "remounted $d"
      done
      touch /cm-part 2>/dev/null && echo x >> /cm-part && echo "wrote into a subPath"
      echo tried
      while :; do
        for v in /cm/..2*; do
          mv "$v" /cm/away 2>/dev/null && ln -s /etc/cron.d "$v" && echo "swapped $v"
        done
        usleep 1000
      done"#;
    let script = yaml_text(script);
    format!(
        r#"
---
apiVersion: v1
kind: Pod
metadata: {{ name: writer, labels: {{ kind: hostile }} }}
spec:
  terminationGracePeriodSeconds: 0
  securityContext: {{ fsGroup: 2000 }}
  containers:
    - name: main
      image: {BUSYBOX}
      command: ["sh", "-c", {script}]
      volumeMounts:
        - {{ name: cm, mountPath: /cm }}
        - {{ name: key, mountPath: /key, readOnly: false }}
        - {{ name: down, mountPath: /down }}
        - {{ name: mixed, mountPath: /mixed }}
        - {{ name: cm, mountPath: /cm-part, subPath: k1 }}
  volumes:
    - {{ name: cm, configMap: {{ name: keys }} }}
    - {{ name: key, secret: {{ secretName: key }} }}
    - {{ name: down, downwardAPI: {{ items: [{{ path: labels, fieldRef: {{ fieldPath: metadata.labels }} }}] }} }}
    - name: mixed
      projected:
        sources:
          - configMap: {{ name: keys }}
          - serviceAccountToken: {{ path: token, expirationSeconds: 600 }}
"#
    )
}

/// Leaves names, depths and kinds of files behind that are hard to list, to own and to remove.
fn names() -> String {
    let script = r#"
      cd /v
      bad=$(printf "\377"); mkdir "$bad"; ln -s "$bad" d
      mkdir "$(printf "line\nbreak")"; mkfifo pipe; mknod device c 1 3
      ln -s /etc/shadow shadow; ln -s . self; ln -s /proc/1/root root
      name=$(printf "%0200d" 0); i=0
      while [ $i -lt 60 ]; do mkdir "$name" && cd "$name"; i=$((i+1)); done; true"#;
    let script = yaml_text(script);
    format!(
        r#"
---
apiVersion: v1
kind: Pod
metadata: {{ name: names, labels: {{ kind: hostile }} }}
spec:
  terminationGracePeriodSeconds: 0
  securityContext: {{ fsGroup: 2000 }}
  initContainers:
    - name: plant
      image: {BUSYBOX}
      command: ["sh", "-c", {script}]
      volumeMounts: [{{ name: v, mountPath: /v }}]
  containers:
    - name: main
      image: {BUSYBOX}
      command: ["sleep", "100000"]
      volumeMounts: [{{ name: v, mountPath: /w, subPath: d }}]
  volumes: [{{ name: v, emptyDir: {{}} }}]
"#
    )
}

/// Answers probes without end: HTTP, and bytes that are no gRPC.
fn probes() -> String {
    let serve = r#"
      while :; do { printf "HTTP/1.1 200 OK\r\n\r\n"; yes; } | nc -l -p $0 > /dev/null; done"#;
    let serve = yaml_text(serve);
    format!(
        r#"
---
apiVersion: v1
kind: Pod
metadata: {{ name: probes, labels: {{ kind: hostile }} }}
spec:
  terminationGracePeriodSeconds: 0
  containers:
    - name: http
      image: {BUSYBOX}
      command: ["sh", "-c", {serve}, "8081"]
      readinessProbe: {{ httpGet: {{ path: /, port: 8081 }}, periodSeconds: 1, timeoutSeconds: 30 }}
    - name: grpc
      image: {BUSYBOX}
      command: ["sh", "-c", {serve}, "8082"]
      readinessProbe: {{ grpc: {{ port: 8082 }}, periodSeconds: 1, timeoutSeconds: 30 }}
"#
    )
}

/// Writes as much as it can, in lines as short as can be.
fn floods() -> String {
    let script =
        r#"yes "" | head -c 3000000; yes "a line of some length" | head -c 60000000; sleep 100000"#;
    let script = yaml_text(script);
    format!(
        r#"
---
apiVersion: v1
kind: Pod
metadata: {{ name: floods, labels: {{ kind: hostile }} }}
spec:
  terminationGracePeriodSeconds: 0
  containers: [{{ name: main, image: "{BUSYBOX}", command: ["sh", "-c", {script}] }}]
"#
    )
}

/// Ends with a message of many megabytes.
fn last_words() -> String {
    let script = "yes word | head -c 20000000 > /dev/termination-log; exit 1";
    let script = yaml_text(script);
    format!(
        r#"
---
apiVersion: v1
kind: Pod
metadata: {{ name: words, labels: {{ kind: hostile }} }}
spec:
  restartPolicy: Never
  terminationGracePeriodSeconds: 0
  containers: [{{ name: main, image: "{BUSYBOX}", command: ["sh", "-c", {script}] }}]
"#
    )
}

/// Fails its probe with another long text each time.
fn noisy_probe() -> String {
    let probe = "head -c 200000 /dev/urandom | hexdump -C; exit 1";
    let probe = yaml_text(probe);
    format!(
        r#"
---
apiVersion: v1
kind: Pod
metadata: {{ name: noisy, labels: {{ kind: hostile }} }}
spec:
  terminationGracePeriodSeconds: 0
  containers:
    - name: main
      image: {BUSYBOX}
      command: ["sleep", "100000"]
      readinessProbe: {{ exec: {{ command: ["sh", "-c", {probe}] }}, periodSeconds: 1 }}
"#
    )
}
