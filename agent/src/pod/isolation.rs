//! Isolation that a pod asks for and this node does not give: the pod is refused, with the kubelet's reason. Nothing is
//! dropped in silence, since the API server and PodSecurity admission may have allowed other things because of it.

use std::path::Path;

use k8s_openapi::api::core::v1::{
    AppArmorProfile, Container, Pod, PodSecurityContext, SELinuxOptions, SecurityContext,
};

use super::spec;
use super::status::Ending;

/// Sysctls that are a pod's own and harm no other (the kubelet's list of 1.36).
const SAFE_SYSCTLS: [&str; 12] = [
    "kernel.shm_rmid_forced",
    "net.ipv4.ip_local_port_range",
    "net.ipv4.ip_local_reserved_ports",
    "net.ipv4.ip_unprivileged_port_start",
    "net.ipv4.ping_group_range",
    "net.ipv4.tcp_fin_timeout",
    "net.ipv4.tcp_keepalive_intvl",
    "net.ipv4.tcp_keepalive_probes",
    "net.ipv4.tcp_keepalive_time",
    "net.ipv4.tcp_rmem",
    "net.ipv4.tcp_syncookies",
    "net.ipv4.tcp_wmem",
];
const APPARMOR_ANNOTATION: &str = "container.apparmor.security.beta.kubernetes.io/";

/// What the node's kernel can do.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
pub(crate) struct Kernel {
    pub(crate) apparmor: bool,
    pub(crate) selinux: bool,
}

impl Kernel {
    /// Looks at the running kernel.
    pub(crate) fn detect() -> Self {
        let enabled = std::fs::read("/sys/module/apparmor/parameters/enabled");
        Self {
            apparmor: enabled.is_ok_and(|text| text.starts_with(b"Y")),
            selinux: Path::new("/sys/fs/selinux/enforce").exists(),
        }
    }
}

/// Whether everything that the pod asks for can be given.
///
/// # Errors
/// The pod's end, which names the field.
pub(crate) fn check(pod: &Pod, kernel: Kernel, unsafe_sysctls: &[String]) -> Result<(), Ending> {
    let Some(pod_spec) = spec::spec(pod) else { return Ok(()) };
    let own = pod_spec.security_context.as_ref();
    if pod_spec.host_users == Some(false) {
        return Err(refused("spec.hostUsers: false asks for a user namespace"));
    }
    if pod_spec.resource_claims.as_ref().is_some_and(|claims| !claims.is_empty()) {
        return Err(refused("spec.resourceClaims asks for devices"));
    }
    check_sysctls(own, unsafe_sysctls)?;
    check_profiles(
        own.and_then(|own| own.app_armor_profile.as_ref()),
        own.and_then(|own| own.se_linux_options.as_ref()),
        kernel,
    )?;
    let annotations = pod.metadata.annotations.iter().flatten();
    for (name, profile) in annotations {
        if name.starts_with(APPARMOR_ANNOTATION) && profile != "unconfined" {
            return Err(apparmor(kernel));
        }
    }
    let containers = spec::main_containers(pod).iter().chain(spec::init_containers(pod));
    for container in containers {
        check_container(container, kernel)?;
    }
    Ok(())
}

/// As [`check`], for one container; ephemeral ones come after the pod was admitted.
///
/// # Errors
/// As [`check`].
pub(crate) fn check_container(container: &Container, kernel: Kernel) -> Result<(), Ending> {
    let own = container.security_context.clone().unwrap_or_default();
    let SecurityContext { app_armor_profile, se_linux_options, proc_mount, privileged, .. } = own;
    check_profiles(app_armor_profile.as_ref(), se_linux_options.as_ref(), kernel)?;
    if proc_mount.as_deref() == Some("Unmasked") && privileged != Some(true) {
        return Err(refused("procMount: Unmasked needs a user namespace"));
    }
    let mounts = container.volume_mounts.iter().flatten();
    for mount in mounts {
        if mount.recursive_read_only.as_deref() == Some("Enabled") {
            return Err(refused("a volumeMount with recursiveReadOnly: Enabled"));
        }
    }
    if container.volume_devices.as_ref().is_some_and(|devices| !devices.is_empty()) {
        return Err(refused("volumeDevices asks for a block device"));
    }
    let limits = container.resources.iter().flat_map(|resources| {
        resources.limits.iter().chain(&resources.requests).flat_map(|named| named.keys())
    });
    for name in limits {
        if name.starts_with("hugepages-") {
            return Err(refused(&format!("the resource {name}")));
        }
    }
    Ok(())
}

fn check_sysctls(own: Option<&PodSecurityContext>, allowed: &[String]) -> Result<(), Ending> {
    for sysctl in own.iter().flat_map(|own| own.sysctls.iter().flatten()) {
        // Both separators are allowed: net/ipv4/tcp_rmem.
        let name = sysctl.name.replace('/', ".");
        let may = |pattern: &String| match pattern.strip_suffix('*') {
            Some(prefix) => name.starts_with(prefix),
            None => *pattern == name,
        };
        if !SAFE_SYSCTLS.contains(&name.as_str()) && !allowed.iter().any(may) {
            let message = format!("Pod was rejected: forbidden sysctl: \"{name}\" not allowlisted");
            return Err(Ending { reason: "SysctlForbidden".into(), message });
        }
    }
    Ok(())
}

fn check_profiles(
    profile: Option<&AppArmorProfile>,
    labels: Option<&SELinuxOptions>,
    kernel: Kernel,
) -> Result<(), Ending> {
    if profile.is_some_and(|profile| profile.type_ != "Unconfined") {
        return Err(apparmor(kernel));
    }
    // A kernel without SELinux has no labels to give: there, as in every runtime, the field has no meaning.
    if labels.is_some() && kernel.selinux {
        return Err(refused("seLinuxOptions"));
    }
    Ok(())
}

fn apparmor(kernel: Kernel) -> Ending {
    let why = match kernel.apparmor {
        true => "this node does not load or apply AppArmor profiles",
        false => "AppArmor is not enabled on the host",
    };
    let message = format!("Pod was rejected: Cannot enforce AppArmor: {why}");
    Ending { reason: "AppArmor".into(), message }
}

fn refused(what: &str) -> Ending {
    let message = format!("Pod was rejected: {what}, which this node does not give");
    Ending { reason: "UnexpectedAdmissionError".into(), message }
}

#[cfg(test)]
mod tests {
    use serde_json::{Value, json};

    use super::*;

    const NONE: Kernel = Kernel { apparmor: false, selinux: false };

    fn reason(spec: Value, kernel: Kernel) -> String {
        let pod = serde_json::from_value(json!({"metadata": {}, "spec": spec})).unwrap();
        let allowed = ["kernel.shm*".to_owned(), "net.core.somaxconn".to_owned()];
        check(&pod, kernel, &allowed).map_or_else(|ending| ending.reason, |()| "ok".into())
    }

    fn container(fields: Value) -> Value {
        let mut container = json!({"name": "c"});
        container.as_object_mut().unwrap().extend(fields.as_object().unwrap().clone());
        json!({"containers": [container]})
    }

    #[test]
    fn what_cannot_be_given_is_refused_with_its_reason() {
        let sysctl = |name: &str| {
            json!({"containers": [],
                "securityContext": {"sysctls": [{"name": name, "value": "1"}]}})
        };
        let armor = |kind: &str| json!({"securityContext": {"appArmorProfile": {"type": kind}}});
        let cases = [
            (json!({"containers": []}), "ok"),
            (json!({"containers": [], "hostUsers": false}), "UnexpectedAdmissionError"),
            (json!({"containers": [], "hostUsers": true}), "ok"),
            (
                json!({"containers": [], "resourceClaims": [{"name": "gpu"}]}),
                "UnexpectedAdmissionError",
            ),
            (sysctl("net.ipv4.tcp_rmem"), "ok"),
            (sysctl("net/ipv4/tcp_rmem"), "ok"),
            (sysctl("kernel.shmmax"), "ok"),
            (sysctl("kernel.sem"), "SysctlForbidden"),
            (sysctl("kernel.core_pattern"), "SysctlForbidden"),
            (container(armor("Unconfined")), "ok"),
            (container(armor("RuntimeDefault")), "AppArmor"),
            (container(armor("Localhost")), "AppArmor"),
            (
                container(json!({"securityContext": {"procMount": "Unmasked"}})),
                "UnexpectedAdmissionError",
            ),
            (
                container(
                    json!({"securityContext": {"procMount": "Unmasked", "privileged": true}}),
                ),
                "ok",
            ),
            (
                container(json!({"volumeMounts": [
                {"name": "v", "mountPath": "/v", "recursiveReadOnly": "Enabled"}]})),
                "UnexpectedAdmissionError",
            ),
            (
                container(json!({"volumeMounts": [
                {"name": "v", "mountPath": "/v", "recursiveReadOnly": "IfPossible"}]})),
                "ok",
            ),
            (
                container(json!({"volumeDevices": [{"name": "v", "devicePath": "/dev/x"}]})),
                "UnexpectedAdmissionError",
            ),
            (
                container(json!({"resources": {"limits": {"hugepages-2Mi": "4Mi"}}})),
                "UnexpectedAdmissionError",
            ),
            (container(json!({"securityContext": {"seLinuxOptions": {"level": "s0"}}})), "ok"),
        ];
        for (spec, want) in cases {
            assert_eq!(reason(spec.clone(), NONE), want, "{spec}");
        }
        let selinux = Kernel { selinux: true, ..NONE };
        let labelled = container(json!({"securityContext": {"seLinuxOptions": {"level": "s0"}}}));
        assert_eq!(reason(labelled, selinux), "UnexpectedAdmissionError");
    }

    #[test]
    fn the_old_annotation_counts_as_the_field() {
        let annotated = |profile: &str| {
            let pod = json!({"metadata": {"annotations": {
                "container.apparmor.security.beta.kubernetes.io/c": profile}},
                "spec": {"containers": [{"name": "c"}]}});
            check(&serde_json::from_value(pod).unwrap(), NONE, &[]).is_ok()
        };
        assert!(annotated("unconfined"));
        assert!(!annotated("runtime/default") && !annotated("localhost/x"));
    }
}
