//! Why packets are dropped, in words.

use keelson_ebpf_abi::{
    DROP_FAILED, DROP_FRAGMENT, DROP_HELD, DROP_NO_ADDRESS, DROP_NO_PORT, DROP_NO_ROUTE,
    DROP_NO_SUCH_ADDRESS, DROP_OWN_CLIENT, DROP_POLICY, DROP_SOURCE, DROP_UNANSWERED,
    DROP_UNKNOWN_SERVICE,
};

/// A word for programs, and what it means.
pub(crate) fn reason(number: u32) -> (&'static str, &'static str) {
    match number {
        DROP_NO_SUCH_ADDRESS => ("no_such_address", "nobody has that address of a Service range"),
        DROP_SOURCE => ("source_ranges", "loadBalancerSourceRanges keep the client out"),
        DROP_POLICY => ("local_policy", "its policy is Local and no endpoint is here"),
        DROP_NO_ADDRESS => ("no_node_address", "the interface has no address to masquerade with"),
        DROP_NO_PORT => ("no_port", "all ports to masquerade with are taken"),
        DROP_FAILED => ("failed", "the kernel refused to change or to remember something"),
        DROP_FRAGMENT => ("fragment", "the first piece of the packet did not come by"),
        DROP_NO_ROUTE => ("no_route", "the node has no route to the endpoint"),
        DROP_UNANSWERED => ("unanswered", "nobody is there, and the sender must not be told"),
        DROP_HELD => ("held", "connections move to other maps, the client tries again"),
        DROP_OWN_CLIENT => {
            ("own_client", "the node asked another one for an endpoint that it has itself")
        }
        DROP_UNKNOWN_SERVICE => {
            ("unknown_service", "another node tells of a Service that is not known here")
        }
        _ => ("other", "for a reason that this version does not know"),
    }
}
