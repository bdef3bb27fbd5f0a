//! Services and EndpointSlices.

use std::collections::BTreeSet;

use serde_json::{Value, json};

use super::{choice, list, names, port, string};
use crate::error::Cause;

pub(super) fn check(service: &Value, causes: &mut Vec<Cause>) {
    let spec = &service["spec"];
    let types = ["ClusterIP", "ExternalName", "LoadBalancer", "NodePort"];
    choice("spec.type", &spec["type"], &types, causes);
    choice("spec.sessionAffinity", &spec["sessionAffinity"], &["ClientIP", "None"], causes);
    for policy in ["externalTrafficPolicy", "internalTrafficPolicy"] {
        choice(&format!("spec.{policy}"), &spec[policy], &["Cluster", "Local"], causes);
    }
    let policies = ["SingleStack", "PreferDualStack", "RequireDualStack"];
    choice("spec.ipFamilyPolicy", &spec["ipFamilyPolicy"], &policies, causes);
    super::labels("spec.selector", &spec["selector"], causes);
    let headless = spec["clusterIP"] == "None";
    let named = spec["type"] == "ExternalName";
    if named {
        let name = string(&spec["externalName"]);
        if name.is_empty() {
            causes.push(Cause::required("spec.externalName", ""));
        } else if let Some(why) = names::subdomain(name.trim_end_matches('.')) {
            causes.push(Cause::invalid("spec.externalName", &spec["externalName"], &why));
        }
    }
    if headless && matches!(string(&spec["type"]), "NodePort" | "LoadBalancer") {
        let text = format!("may not be set to 'None' for {} services", string(&spec["type"]));
        causes.push(Cause::invalid("spec.clusterIPs[0]", &json!("None"), &text));
    }
    if list(&spec["ports"]).is_empty() && !headless && !named {
        causes.push(Cause::required("spec.ports", ""));
    }
    ports(spec, causes);
    for (index, address) in list(&spec["externalIPs"]).iter().enumerate() {
        if string(address).parse::<std::net::IpAddr>().is_err() {
            let text = "must be a valid IP address, (e.g. 10.9.8.7 or 2001:db8::ffff)";
            causes.push(Cause::invalid(format!("spec.externalIPs[{index}]"), address, text));
        }
    }
    if let Some(secs) = spec["sessionAffinityConfig"]["clientIP"]["timeoutSeconds"].as_i64()
        && !(1..=86_400).contains(&secs)
    {
        let text = "must be greater than 0 and less than 86400";
        let field = "spec.sessionAffinityConfig.clientIP.timeoutSeconds";
        causes.push(Cause::invalid(field, &json!(secs), text));
    }
}

fn ports(spec: &Value, causes: &mut Vec<Cause>) {
    let all = list(&spec["ports"]);
    let (mut known, mut numbers) = (BTreeSet::new(), BTreeSet::new());
    for (index, one) in all.iter().enumerate() {
        let field = format!("spec.ports[{index}]");
        let name = string(&one["name"]);
        if name.is_empty() {
            if all.len() > 1 {
                causes.push(Cause::required(format!("{field}.name"), ""));
            }
        } else if let Some(why) = names::label(name) {
            causes.push(Cause::invalid(format!("{field}.name"), &one["name"], &why));
        } else if !known.insert(name) {
            causes.push(Cause::duplicate(format!("{field}.name"), &one["name"]));
        }
        port(&format!("{field}.port"), &one["port"], causes);
        choice(&format!("{field}.protocol"), &one["protocol"], &["SCTP", "TCP", "UDP"], causes);
        match &one["targetPort"] {
            Value::String(text) => {
                if let Some(why) = names::port_name(text) {
                    causes.push(Cause::invalid(
                        format!("{field}.targetPort"),
                        &one["targetPort"],
                        &why,
                    ));
                }
            }
            number => port(&format!("{field}.targetPort"), number, causes),
        }
        if one["nodePort"].as_i64().unwrap_or(0) != 0
            && matches!(string(&spec["type"]), "ClusterIP" | "ExternalName")
        {
            let text = format!("may not be used when `type` is '{}'", string(&spec["type"]));
            causes.push(Cause::forbidden(format!("{field}.nodePort"), &text));
        }
        if !numbers.insert((one["port"].as_i64(), string(&one["protocol"]))) {
            let value = json!({"port": one["port"], "protocol": one["protocol"]});
            causes.push(Cause::duplicate(field, &value));
        }
    }
}

pub(super) fn check_update(old: &Value, new: &Value, causes: &mut Vec<Cause>) {
    let (before, after) = (&old["spec"], &new["spec"]);
    if before["type"] == "ExternalName" || after["type"] == "ExternalName" {
        return;
    }
    let (was, is) = (&before["clusterIPs"][0], &after["clusterIPs"][0]);
    if was.is_string() && was != is {
        causes.push(Cause::invalid(
            "spec.clusterIPs[0]",
            &after["clusterIPs"],
            "may not change once set",
        ));
    } else if before["clusterIP"].is_string() && before["clusterIP"] != after["clusterIP"] {
        causes.push(Cause::invalid(
            "spec.clusterIP",
            &after["clusterIP"],
            "may not change once set",
        ));
    }
    if before["ipFamilies"][0].is_string() && before["ipFamilies"][0] != after["ipFamilies"][0] {
        let text = "may not change once set";
        causes.push(Cause::invalid("spec.ipFamilies[0]", &after["ipFamilies"], text));
    }
}

pub(super) fn check_slice(slice: &Value, causes: &mut Vec<Cause>) {
    const TYPES: &[&str] = &["FQDN", "IPv4", "IPv6"];
    if string(&slice["addressType"]).is_empty() {
        causes.push(Cause::required("addressType", ""));
    }
    choice("addressType", &slice["addressType"], TYPES, causes);
    for (index, endpoint) in list(&slice["endpoints"]).iter().enumerate() {
        let field = format!("endpoints[{index}].addresses");
        if list(&endpoint["addresses"]).is_empty() {
            causes.push(Cause::required(field.clone(), "must contain at least 1 address"));
        }
        for (number, address) in list(&endpoint["addresses"]).iter().enumerate() {
            let parsed = string(address).parse::<std::net::IpAddr>();
            let fits = match string(&slice["addressType"]) {
                "IPv4" => parsed.is_ok_and(|a| a.is_ipv4()),
                "IPv6" => parsed.is_ok_and(|a| a.is_ipv6()),
                _ => true,
            };
            if !fits {
                let text = format!("must be an {} address", string(&slice["addressType"]));
                causes.push(Cause::invalid(format!("{field}[{number}]"), address, &text));
            }
        }
    }
    for (index, one) in
        list(&slice["ports"]).iter().enumerate().filter(|(_, p)| !p["port"].is_null())
    {
        port(&format!("ports[{index}].port"), &one["port"], causes);
    }
}
