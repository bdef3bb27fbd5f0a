use std::path::Path;
use std::time::Duration;

use super::*;
use crate::config::ImageGc;

const HEAD: &str = "apiVersion: kubelet.config.k8s.io/v1beta1\nkind: KubeletConfiguration\n";

fn read(body: &str) -> Result<(AgentConfig, Vec<String>), String> {
    let mut config = AgentConfig::default();
    apply_text(&mut config, &format!("{HEAD}{body}"), Path::new("/etc/kubelet.yaml"))
        .map(|warnings| (config, warnings))
        .map_err(|error| error.to_string())
}

/// What kubeadm 1.36 writes, shortened nowhere that matters.
const KUBEADM: &str = "
authentication:
  anonymous: {enabled: false}
  webhook: {cacheTTL: 0s, enabled: true}
  x509: {clientCAFile: /etc/kubernetes/pki/ca.crt}
authorization:
  mode: Webhook
  webhook: {cacheAuthorizedTTL: 0s, cacheUnauthorizedTTL: 0s}
cgroupDriver: systemd
clusterDNS: [10.96.0.10]
clusterDomain: cluster.local
containerRuntimeEndpoint: unix:///var/run/containerd/containerd.sock
cpuManagerReconcilePeriod: 0s
crashLoopBackOff: {}
evictionPressureTransitionPeriod: 0s
fileCheckFrequency: 0s
healthzBindAddress: 127.0.0.1
healthzPort: 10248
logging: {flushFrequency: 0, options: {json: {infoBufferSize: \"0\"}}, verbosity: 0}
memorySwap: {}
nodeStatusReportFrequency: 0s
rotateCertificates: true
staticPodPath: manifests
";

#[test]
fn kubeadms_file_is_read_as_it_is() {
    let (config, warnings) = read(KUBEADM).unwrap();
    assert_eq!(config.server.client_ca_file.unwrap(), Path::new("/etc/kubernetes/pki/ca.crt"));
    assert_eq!(config.runtime.cgroup_driver, CgroupDriver::Systemd);
    assert_eq!(config.runtime.socket, Path::new("/var/run/containerd/containerd.sock"));
    assert_eq!(config.pods.cluster_dns, [IpAddr::from([10, 96, 0, 10])]);
    assert_eq!(config.static_pod_path.unwrap(), Path::new("/etc/manifests"));
    // 0s is kubeadm's way to say "the default".
    assert_eq!(config.server.token_review_ttl, Duration::from_secs(120));
    assert_eq!(config.node.status_report_frequency, Duration::from_secs(300));
    let names: Vec<_> = warnings.iter().map(|w| w.split(' ').nth(1).unwrap()).collect();
    assert_eq!(names, ["logging", "rotateCertificates"], "{warnings:#?}");
}

#[test]
fn unsupported_and_unknown_fields_are_told_apart() {
    let (_, warnings) =
        read("syncFrequency: 1m\nmaxPodz: 3\nauthentication: {oidc: {a: 1}}").unwrap();
    assert_eq!(
        warnings,
        [
            "/etc/kubelet.yaml: authentication.oidc is not supported and has no effect",
            "/etc/kubelet.yaml: maxPodz is unknown and has no effect",
            "/etc/kubelet.yaml: syncFrequency is not supported and has no effect",
        ]
    );
}

#[test]
fn bad_values_name_the_field_and_what_belongs_there() {
    for (body, want) in [
        ("maxPods: many", "maxPods: \"many\" is not a whole number in the field's range"),
        ("port: 70000", "port: 70000 is not a whole number in the field's range"),
        ("clusterDNS: [10.0.0.1, dns]", "clusterDNS[1]: \"dns\" is not an IP address"),
        ("cgroupDriver: cgroups", "cgroupDriver: \"cgroups\" is not cgroupfs or systemd"),
        ("authentication: {x509: 5}", "authentication.x509: 5 is not a mapping of fields"),
        (
            "authentication: {webhook: {cacheTTL: soon}}",
            "authentication.webhook.cacheTTL: \"soon\" is not a duration (such as 10s, 5m0s or 1h30m)",
        ),
        (
            "kubeReserved: {cpu: much}",
            "kubeReserved.cpu: \"much\" is not a quantity (such as 500m, 2 or 128Mi)",
        ),
        (
            "tlsCertFile: a.crt",
            "tlsPrivateKeyFile: nothing is not a file: certificate and key belong together",
        ),
    ] {
        assert_eq!(read(body).unwrap_err(), format!("/etc/kubelet.yaml: {want}"));
    }
}

#[test]
fn reservations_thresholds_and_taints() {
    let (config, warnings) = read(
        "kubeReserved: {cpu: 100m, memory: 64Mi}\nsystemReserved: {cpu: 1}\n\
         evictionHard: {memory.available: 5%, nodefs.available: 1Gi, imagefs.available: 15%}\n\
         registerWithTaints: [{key: a, value: b, effect: NoSchedule}]\n",
    )
    .unwrap();
    assert_eq!(config.node.kube_reserved["cpu"], 100);
    assert_eq!(config.node.kube_reserved["memory"], 64 << 20);
    assert_eq!(config.node.system_reserved["cpu"], 1000);
    assert_eq!(config.node.eviction_memory.of(1000), 50);
    assert_eq!(config.node.eviction_disk, Threshold::Amount(1 << 30));
    assert_eq!(config.node.taints[0].effect, "NoSchedule");
    assert!(warnings[0].contains("evictionHard.imagefs.available is not supported"));
}

#[test]
fn how_long_images_stay_and_how_many_the_node_lists() {
    let (config, warnings) = read(
        "imageGCHighThresholdPercent: 70\nimageGCLowThresholdPercent: 60\nimageMinimumGCAge: 1m\n\
         imageMaximumGCAge: 48h\nnodeStatusMaxImages: -1\n",
    )
    .unwrap();
    assert_eq!(warnings, [""; 0]);
    let rules = ImageGc {
        high_threshold_percent: 70,
        low_threshold_percent: 60,
        minimum_age: Duration::from_secs(60),
        maximum_age: Some(Duration::from_secs(48 * 3600)),
    };
    assert_eq!((config.image_gc, config.node.status_max_images), (rules, None));
    let (config, _) = read("imageMinimumGCAge: 0s\nimageMaximumGCAge: 0s\n").unwrap();
    assert_eq!((config.image_gc, config.node.status_max_images), (ImageGc::default(), Some(50)));
    for text in ["nodeStatusMaxImages: -2", "imageGCHighThresholdPercent: 300"] {
        assert!(read(text).unwrap_err().contains(text.split(':').next().unwrap()));
    }
}

#[test]
fn a_file_of_another_kind_is_refused() {
    let mut config = AgentConfig::default();
    for text in ["kind: Pod", "- a\n- b", "apiVersion: v1\nkind: KubeletConfiguration"] {
        apply_text(&mut config, text, Path::new("f.yaml")).unwrap_err();
    }
    let error = apply_text(&mut config, "a: [", Path::new("f.yaml")).unwrap_err();
    assert!(error.to_string().starts_with("f.yaml is not YAML"), "{error}");
}

proptest::proptest! {
    #[test]
    fn no_text_makes_the_reader_panic(text in "[ -~\n]{0,200}") {
        let mut config = AgentConfig::default();
        drop(apply_text(&mut config, &format!("{HEAD}{text}"), Path::new("f.yaml")));
    }
}
