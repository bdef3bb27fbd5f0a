//! What an identity may do: fixed roles instead of RBAC objects, for one machine.
//!
//! `system:masters` may do everything; nodes and proxies what kubelet and kube-proxy need; service
//! accounts only discovery and questions about themselves; nobody in particular only health.

use super::Identity;

/// What a request wants.
#[derive(Debug, Clone, Default)]
pub(crate) struct Attributes<'a> {
    pub(crate) verb: &'a str,
    pub(crate) group: &'a str,
    pub(crate) resource: &'a str,
    pub(crate) subresource: &'a str,
    pub(crate) namespace: &'a str,
    pub(crate) name: &'a str,
    /// For requests to no resource: the path.
    pub(crate) path: &'a str,
}

const READ: &[&str] = &["get", "list", "watch"];
const EVENTS: &[&str] = &["create", "patch", "update"];

/// Whether `identity` may do it.
pub(crate) fn allowed(identity: &Identity, wants: &Attributes<'_>) -> bool {
    if identity.is_in("system:masters") {
        return true;
    }
    if wants.resource.is_empty() {
        return open_path(wants.path) || (!identity.is_anonymous() && discovery_path(wants.path));
    }
    if identity.is_anonymous() {
        return false;
    }
    if asks_about_itself(wants) {
        return true;
    }
    (identity.is_in("system:nodes") && node_may(wants))
        || ((identity.is_in("system:kube-proxy") || identity.user == "system:kube-proxy")
            && proxy_may(wants))
}

fn open_path(path: &str) -> bool {
    ["/healthz", "/livez", "/readyz", "/version"]
        .iter()
        .any(|open| path == *open || path.strip_prefix(open).is_some_and(|r| r.starts_with('/')))
}

fn discovery_path(path: &str) -> bool {
    ["/api", "/apis", "/openapi"]
        .iter()
        .any(|open| path == *open || path.strip_prefix(open).is_some_and(|r| r.starts_with('/')))
}

fn asks_about_itself(wants: &Attributes<'_>) -> bool {
    wants.verb == "create"
        && matches!(
            (wants.group, wants.resource),
            ("authorization.k8s.io", "selfsubjectaccessreviews" | "selfsubjectrulesreviews")
                | ("authentication.k8s.io", "selfsubjectreviews")
        )
}

/// What a kubelet does. Nodes are not kept apart from each other: there is one machine.
fn node_may(wants: &Attributes<'_>) -> bool {
    let verb = wants.verb;
    let read = READ.contains(&verb);
    match (wants.group, wants.resource, wants.subresource) {
        ("", "pods", "") => read || matches!(verb, "create" | "delete"),
        ("", "nodes", "") => read || matches!(verb, "create" | "patch" | "update"),
        ("", "pods" | "nodes", "status") => matches!(verb, "get" | "patch" | "update"),
        ("", "pods", "eviction") | ("", "serviceaccounts", "token") => verb == "create",
        (
            "",
            "services"
            | "endpoints"
            | "configmaps"
            | "secrets"
            | "serviceaccounts"
            | "namespaces"
            | "persistentvolumes"
            | "persistentvolumeclaims",
            "",
        )
        | ("discovery.k8s.io", "endpointslices", "")
        | ("node.k8s.io", "runtimeclasses", "")
        | ("storage.k8s.io", "csidrivers", "")
        | ("networking.k8s.io", "servicecidrs", "") => read,
        ("", "events", "") | ("events.k8s.io", "events", "") => read || EVENTS.contains(&verb),
        ("coordination.k8s.io", "leases", "") | ("storage.k8s.io", "csinodes", "") => {
            read || matches!(verb, "create" | "patch" | "update" | "delete")
        }
        ("authentication.k8s.io", "tokenreviews", "")
        | ("authorization.k8s.io", "subjectaccessreviews", "") => verb == "create",
        _ => false,
    }
}

fn proxy_may(wants: &Attributes<'_>) -> bool {
    let read = READ.contains(&wants.verb);
    match (wants.group, wants.resource, wants.subresource) {
        ("", "nodes" | "services" | "endpoints" | "pods" | "namespaces", "")
        | ("discovery.k8s.io", "endpointslices", "")
        | ("networking.k8s.io", "servicecidrs", "") => read,
        ("", "events", "") | ("events.k8s.io", "events", "") => EVENTS.contains(&wants.verb),
        _ => false,
    }
}

/// The sentence of a refusal, as Kubernetes words it.
pub(crate) fn refusal(identity: &Identity, wants: &Attributes<'_>) -> String {
    let user = &identity.user;
    if wants.resource.is_empty() {
        return format!("forbidden: User \"{user}\" cannot {} path \"{}\"", wants.verb, wants.path);
    }
    let qualified = if wants.group.is_empty() {
        wants.resource.to_owned()
    } else {
        format!("{}.{}", wants.resource, wants.group)
    };
    let name = if wants.name.is_empty() { String::new() } else { format!(" \"{}\"", wants.name) };
    let resource = if wants.subresource.is_empty() {
        wants.resource.to_owned()
    } else {
        format!("{}/{}", wants.resource, wants.subresource)
    };
    let place = if wants.namespace.is_empty() {
        "at the cluster scope".to_owned()
    } else {
        format!("in the namespace \"{}\"", wants.namespace)
    };
    format!(
        "{qualified}{name} is forbidden: User \"{user}\" cannot {} resource \"{resource}\" in API group \"{}\" {place}",
        wants.verb, wants.group
    )
}

#[cfg(test)]
mod tests {
    use super::*;

    fn may(groups: &[&str], verb: &str, group: &str, resource: &str) -> bool {
        let groups = groups.iter().map(|g| (*g).to_owned()).collect();
        let identity = Identity::authenticated("someone", groups);
        allowed(&identity, &Attributes { verb, group, resource, ..Attributes::default() })
    }

    #[test]
    fn roles() {
        assert!(may(&["system:masters"], "delete", "", "secrets"));
        assert!(may(&["system:nodes"], "watch", "", "pods"));
        assert!(!may(&["system:nodes"], "create", "apps", "deployments"));
        assert!(may(&["system:kube-proxy"], "watch", "discovery.k8s.io", "endpointslices"));
        assert!(!may(&["system:kube-proxy"], "get", "", "secrets"));
        assert!(!may(&["system:serviceaccounts"], "list", "", "pods"));
        let review = "selfsubjectaccessreviews";
        assert!(may(&["system:serviceaccounts"], "create", "authorization.k8s.io", review));
    }

    #[test]
    fn nobody_sees_health_only() {
        let path = |path| Attributes { verb: "get", path, ..Attributes::default() };
        assert!(allowed(&Identity::anonymous(), &path("/livez/ping")));
        assert!(!allowed(&Identity::anonymous(), &path("/apis")));
        assert!(!allowed(&Identity::anonymous(), &path("/healthzoo")));
    }
}
