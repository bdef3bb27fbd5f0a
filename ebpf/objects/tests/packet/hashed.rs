//! Endpoints that are chosen by the client.

use keelson_ebpf_abi::{FRONTEND_HASHED, Frontend, MASQUERADE_NEVER, MEMBER_SERVING};

use crate::bytes::{SYN, tcp, udp};
use crate::kernel::{Kernel, same, to_pool, tuple};

const SLOTS: usize = 7;

#[test]
fn a_client_gets_the_endpoint_of_its_slot() {
    for (service, host) in [("10.96.0.10:80", "198.51.100.7"), ("[fd96::10]:80", "[2001:db8::7]")] {
        let mut kernel = Kernel::new();
        let is_v4 = service.starts_with("10.");
        let endpoints: Vec<String> = (0..SLOTS)
            .map(|slot| {
                if is_v4 {
                    format!("10.1.0.{}:8080", slot + 1)
                } else {
                    format!("[fd01::{}]:8080", slot + 1)
                }
            })
            .collect();
        let slots: Vec<_> = endpoints.iter().map(|e| (&**e, 0, MEMBER_SERVING)).collect();
        kernel.pool(1, &slots);
        for protocol in [6, 17] {
            let frontend = Frontend { flags: FRONTEND_HASHED, ..to_pool(1, 1, MASQUERADE_NEVER) };
            kernel.frontend(service, protocol, frontend);
        }
        for port in 40_000..40_100 {
            let client = format!("{host}:{port}");
            for packet in [tcp(SYN, &client, service), udp(&client, service)] {
                let hash = u64::from(tuple(&packet).client_hash());
                let slot = usize::try_from((hash * SLOTS as u64) >> 32).unwrap();
                same(&kernel.arrives(&packet), &packet.clone().to(&endpoints[slot]));
            }
        }
    }
}
