//! The proxy with the rights of kube-proxy.

use keelson_tests::node::{BUSYBOX, read, until};

use crate::cluster::Cluster;

#[test]
fn a_service_answers_on_its_cluster_ip_and_node_port() {
    let Some(mut cluster) = Cluster::with_node() else { return };
    cluster
        .server
        .apply(&format!(
            r#"
apiVersion: v1
kind: Pod
metadata: {{ name: web }}
spec:
  nodeName: node
  terminationGracePeriodSeconds: 0
  containers:
    - name: httpd
      image: {BUSYBOX}
      command: ["sh", "-c", "echo hello > /www/index.html; exec httpd -f -p 8080 -h /www"]
      readinessProbe: {{ tcpSocket: {{ port: 8080 }}, periodSeconds: 1 }}
---
apiVersion: v1
kind: Service
metadata: {{ name: web }}
spec:
  type: NodePort
  clusterIP: 10.96.0.80
  ports: [{{ name: http, port: 80, targetPort: 8080, nodePort: 30123 }}]
"#
        ))
        .unwrap();
    cluster.run_proxy().unwrap();
    cluster.wait_for("pod/web", "condition=Ready");
    let ip =
        cluster.server.kubectl(&["get", "pod", "web", "-o", "jsonpath={.status.podIP}"]).unwrap();
    cluster
        .server
        .apply(&format!(
            r#"
apiVersion: discovery.k8s.io/v1
kind: EndpointSlice
metadata: {{ name: web-1, labels: {{ kubernetes.io/service-name: web }} }}
addressType: IPv4
ports: [{{ name: http, port: 8080, protocol: TCP }}]
endpoints: [{{ addresses: ["{ip}"], conditions: {{ ready: true }}, nodeName: node }}]
"#
        ))
        .unwrap();
    for (host, port) in [("10.96.0.80", 80), ("198.18.0.2", 30123)] {
        until("the Service answers", || {
            let fetch = format!(r"printf 'GET / HTTP/1.0\r\n\r\n' | busybox nc -w 5 {host} {port}");
            let page = read(cluster.node.on_node("busybox").args(["sh", "-c", &fetch]));
            match page {
                Ok(page) if page.contains("hello") => Ok(()),
                answer => Err(format!("{answer:?}\nthe proxy's log:\n{}", cluster.log_of("proxy"))),
            }
        });
    }
    cluster.finish();
}
