//! What becomes of a socket that wants to speak with an address.
//!
//! The same as of a packet (`trace.rs` of the proxy is the oracle), as far as a socket can do it exactly:
//! what it cannot is left alone, and the packet layer does it.

use aya_ebpf::helpers::bpf_get_netns_cookie;
use aya_ebpf::programs::SockAddrContext;
use keelson_ebpf::frontend::{self, Found};
use keelson_ebpf::maps::SETTINGS;
use keelson_ebpf_abi::{
    FRONTEND_HAS_SOURCES, FRONTEND_STICKY, Frontend, MASQUERADE_NEVER, MASQUERADE_UNLESS_POD,
    Route, SETTING_EXEMPTS_NAMESPACES, SETTING_KNOWS_PODS, SETTING_NODE_SOCKETS_ONLY,
    VERDICT_FORWARD, VERDICT_REJECT,
};

use crate::maps::EXEMPT;
use crate::sockaddr::{self, SocketAddress};

pub enum Decision {
    /// No Service, or something that packets must carry.
    Leave,
    /// To an endpoint of the pool. `cookie` is that of the socket's network namespace.
    Forward { frontend: u32, pool: u32, cookie: u64 },
    /// Nobody is there.
    Refuse { frontend: u32 },
    /// A ClusterIP without such a port.
    NoSuchPort,
}

#[inline(always)]
pub fn decide(ctx: &SockAddrContext, to: &SocketAddress, protocol: u8) -> Decision {
    match frontend::find(&to.address, to.port_be, protocol) {
        Found::Nothing => Decision::Leave,
        Found::NoSuchPort => match Client::of(ctx) {
            Some(_) => Decision::NoSuchPort,
            None => Decision::Leave,
        },
        Found::Frontend(frontend) => match Client::of(ctx) {
            Some(client) if client.may_use(ctx, to) => client.follow(frontend, to),
            _ => Decision::Leave,
        },
    }
}

/// Who wants to speak.
struct Client {
    cookie: u64,
    is_node: bool,
    knows_pods: bool,
}

impl Client {
    /// Nothing when its sockets are to be left alone.
    #[inline(always)]
    fn of(ctx: &SockAddrContext) -> Option<Self> {
        let settings = SETTINGS.get(0)?;
        // SAFETY: the context is the one that the kernel passed.
        let cookie = unsafe { bpf_get_netns_cookie(sockaddr::raw(ctx)) };
        // SAFETY: the map is not preallocated, so an element is freed only after a grace period.
        let is_exempt = || unsafe { EXEMPT.get(cookie) }.is_some();
        if settings.flags & SETTING_EXEMPTS_NAMESPACES != 0 && is_exempt() {
            return None;
        }
        let node = match settings.host_cookie {
            // SAFETY: without a context this is the cookie of the first namespace.
            0 => unsafe { bpf_get_netns_cookie(core::ptr::null_mut()) },
            node => node,
        };
        let is_node = cookie == node;
        if !is_node && settings.flags & SETTING_NODE_SOCKETS_ONLY != 0 {
            return None;
        }
        let knows_pods = settings.flags & SETTING_KNOWS_PODS != 0;
        Some(Client { cookie, is_node, knows_pods })
    }

    /// The loopback is the node's for its own sockets only. Those that speak from there already cannot go
    /// on to an endpoint.
    #[inline(always)]
    fn may_use(&self, ctx: &SockAddrContext, to: &SocketAddress) -> bool {
        !to.address.is_loopback() || self.is_node && !sockaddr::is_bound_to_loopback(ctx)
    }

    #[inline(always)]
    fn follow(&self, frontend: &Frontend, to: &SocketAddress) -> Decision {
        if frontend.flags & FRONTEND_HAS_SOURCES != 0 && !self.is_let_in(frontend, to) {
            return Decision::Leave;
        }
        // A pod is one client by its address, also where packets must be masqueraded.
        if frontend.flags & FRONTEND_STICKY != 0 && !self.is_node {
            return Decision::Leave;
        }
        let route =
            if self.is_node || self.knows_pods { &frontend.inside } else { &frontend.outside };
        match route.verdict {
            VERDICT_FORWARD if self.keeps_source(route) => Decision::Forward {
                frontend: frontend.number,
                pool: route.pool,
                cookie: self.cookie,
            },
            VERDICT_REJECT => Decision::Refuse { frontend: frontend.number },
            _ => Decision::Leave,
        }
    }

    /// Whether loadBalancerSourceRanges are known to let it in. What a pod's socket will speak from is not known yet.
    #[inline(always)]
    fn is_let_in(&self, frontend: &Frontend, to: &SocketAddress) -> bool {
        let Some(settings) = SETTINGS.get(0) else { return false };
        let own = if to.address.is_v4() { &settings.address4 } else { &settings.address6 };
        self.is_node && frontend::lets_in(frontend.number, own)
    }

    /// Whether its own address is the one that packets should carry; the node's is anyway.
    #[inline(always)]
    fn keeps_source(&self, route: &Route) -> bool {
        match route.masquerade {
            MASQUERADE_NEVER => true,
            MASQUERADE_UNLESS_POD => self.is_node || self.knows_pods,
            _ => self.is_node,
        }
    }
}
