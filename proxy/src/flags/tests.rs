use super::*;

fn resolve(arguments: &[&str]) -> Result<ProxyConfig, String> {
    let flags = Flags::try_parse_from(["keelson-proxy"].iter().chain(arguments)).unwrap();
    flags.resolve().map(|(config, _)| config).map_err(|error| format!("{error:#}"))
}

#[test]
fn the_detect_local_modes_need_what_they_look_at() {
    let sources = |arguments: &[&str]| resolve(arguments).map(|config| config.local_sources);
    let mode = |name: &'static str| format!("--detect-local-mode={name}");
    assert_eq!(sources(&[]), Ok(LocalSources::Unknown));
    assert_eq!(
        sources(&["--cluster-cidr=10.0.0.0/8"]),
        Ok(LocalSources::Cidrs(vec!["10.0.0.0/8".parse().unwrap()]))
    );
    assert_eq!(sources(&[&mode("NodeCIDR")]), Ok(LocalSources::NodeCidrs));
    assert_eq!(
        sources(&[&mode("BridgeInterface"), "--pod-bridge-interface=cni0"]),
        Ok(LocalSources::Bridge("cni0".to_owned()))
    );
    assert_eq!(
        sources(&[&mode("InterfaceNamePrefix"), "--pod-interface-name-prefix=veth"]),
        Ok(LocalSources::InterfacePrefix("veth".to_owned()))
    );
    for (arguments, complaint) in [
        (
            vec![mode("BridgeInterface")],
            "--detect-local-mode: this mode needs --pod-bridge-interface",
        ),
        (vec![mode("Magic")], "--detect-local-mode: \"Magic\" is not a mode; use ClusterCIDR"),
        (
            vec![mode("BridgeInterface"), "--pod-bridge-interface=longer-than-possible".to_owned()],
            "--pod-bridge-interface: \"longer-than-possible\" is longer than",
        ),
    ] {
        let arguments: Vec<&str> = arguments.iter().map(String::as_str).collect();
        let error = sources(&arguments).unwrap_err();
        assert!(error.starts_with(complaint), "{error}");
    }
}

#[test]
fn node_port_addresses_and_the_state_file() {
    let config = resolve(&[]).unwrap();
    assert_eq!(config.node_port_addresses, NodePortAddresses::Primary);
    assert_eq!(config.state_file, Some(PathBuf::from(STATE_FILE)));
    assert!(config.localhost_node_ports);
    let config = resolve(&[
        "--nodeport-addresses=192.0.2.0/24",
        "--state-file=",
        "--iptables-localhost-nodeports=false",
    ])
    .unwrap();
    let ranges = vec!["192.0.2.0/24".parse().unwrap()];
    assert_eq!(config.node_port_addresses, NodePortAddresses::Ranges(ranges));
    assert_eq!(config.state_file, None);
    assert!(!config.localhost_node_ports);
}

#[test]
fn an_unknown_mode_is_told_with_those_that_exist() {
    let error = resolve(&["--proxy-mode=telepathy"]).unwrap_err();
    assert!(error.contains("\"telepathy\" is not a mode") && error.contains("nftables"), "{error}");
}

#[test]
fn the_limits_of_connection_tracking_are_those_of_mode_ebpf() {
    let max_flows = |arguments: &[&str]| resolve(arguments).unwrap().ebpf.max_flows;
    let at_least = "--conntrack-min=500000";
    assert_eq!(max_flows(&["--conntrack-max-per-core=1", at_least]), 500_000);
    // Left alone there, but no table is without a limit.
    assert_eq!(max_flows(&["--conntrack-max-per-core=0", at_least]), 131_072);
    let endpoints = |arguments: &[&str]| resolve(arguments).unwrap().ebpf.max_endpoints;
    assert_eq!(endpoints(&[]), 1_048_576);
    assert_eq!(endpoints(&["--ebpf-max-endpoints=2000"]), 2000);
    assert!(Flags::try_parse_from(["keelson-proxy", "--ebpf-max-endpoints=1023"]).is_err());
}
