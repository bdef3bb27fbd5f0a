//! What the kernel needs so that node ports answer on 127.0.0.1.

use keelson_netlink::netns::Netns;
use keelson_netlink::sysctl;

/// Lets packets from 127.0.0.1 leave through real interfaces, translated. Whoever calls this also keeps
/// strangers from sending to 127.0.0.1 (CVE-2020-8558).
pub(crate) fn open(netns: &Netns) {
    const SETTING: &str = "net/ipv4/conf/all/route_localnet";
    let written = netns.run(|| sysctl::ensure(SETTING, "1"));
    let reason = match written {
        Ok(Ok(_)) => return,
        Ok(Err(error)) => error.to_string(),
        Err(error) => error.to_string(),
    };
    tracing::warn!(error = %reason, "Node ports will not answer on 127.0.0.1");
}
