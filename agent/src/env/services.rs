//! Variables about services: `<NAME>_SERVICE_HOST` and Docker's link variables, as every Kubernetes pod has them.

use std::collections::BTreeMap;

/// What the variables need of a service.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct ServiceLink {
    pub namespace: String,
    pub name: String,
    pub cluster_ip: String,
    /// Name (may be empty), number, protocol in capitals.
    pub ports: Vec<(String, i32, String)>,
}

/// The variables of a pod in `namespace`. The API server's own service is there even without service links.
pub fn variables<'a>(
    services: impl IntoIterator<Item = &'a ServiceLink>,
    namespace: &str,
    links: bool,
) -> BTreeMap<String, String> {
    let mut chosen: BTreeMap<&str, &ServiceLink> = BTreeMap::new();
    for service in services {
        let master = service.namespace == "default" && service.name == "kubernetes";
        let own = links && service.namespace == namespace;
        // The pod's own namespace wins over the API server's service of that name.
        if own || (master && !chosen.contains_key("kubernetes")) {
            chosen.insert(&service.name, service);
        }
    }
    let mut variables = BTreeMap::new();
    for service in chosen.values().filter(|s| !matches!(s.cluster_ip.as_str(), "" | "None")) {
        add(service, &mut variables);
    }
    variables
}

fn add(service: &ServiceLink, variables: &mut BTreeMap<String, String>) {
    let name = variable_name(&service.name);
    let ip = &service.cluster_ip;
    let mut set = |key: String, value: String| variables.insert(key, value);
    set(format!("{name}_SERVICE_HOST"), ip.clone());
    let host = if ip.contains(':') { format!("[{ip}]") } else { ip.clone() };
    for (index, (port_name, port, protocol)) in service.ports.iter().enumerate() {
        let lower = protocol.to_lowercase();
        let url = format!("{lower}://{host}:{port}");
        if index == 0 {
            set(format!("{name}_SERVICE_PORT"), port.to_string());
            set(format!("{name}_PORT"), url.clone());
        }
        if !port_name.is_empty() {
            set(format!("{name}_SERVICE_PORT_{}", variable_name(port_name)), port.to_string());
        }
        let prefix = format!("{name}_PORT_{port}_{protocol}");
        set(prefix.clone(), url);
        set(format!("{prefix}_PROTO"), lower);
        set(format!("{prefix}_PORT"), port.to_string());
        set(format!("{prefix}_ADDR"), ip.clone());
    }
}

fn variable_name(name: &str) -> String {
    name.to_uppercase().replace('-', "_")
}
