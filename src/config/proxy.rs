//! Through which HTTP proxy a receiver is reached: `--proxy`, else the environment as curl(1)
//! reads it.

use std::fmt;

use hyper_util::client::proxy::matcher::Matcher;

use super::value::{self, ValueError};
use super::{Endpoint, EndpointAddress, Environment};

/// `--proxy`, `proxy`.
#[derive(Clone, PartialEq, Eq, Debug)]
pub enum ProxySetting {
    /// Dial directly, whatever the environment says.
    Direct,
    /// This one.
    Through(Proxy),
}

/// An HTTP proxy that tunnels by `CONNECT` (RFC 9110 §9.3.6).
#[derive(Clone, PartialEq, Eq)]
pub struct Proxy {
    /// Name or IP address without brackets; resolved anew at each connection.
    pub host: String,
    /// TCP port.
    pub port: u16,
    /// Value of `Proxy-Authorization`: a secret.
    pub authorization: Option<String>,
}

impl fmt::Debug for Proxy {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Proxy").field("host", &self.host).field("port", &self.port).finish()
    }
}

impl fmt::Display for Proxy {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self.host.contains(':') {
            true => write!(f, "[{}]:{}", self.host, self.port),
            false => write!(f, "{}:{}", self.host, self.port),
        }
    }
}

/// `http://HOST[:PORT]`, or `none`. A user and password come from the environment only.
pub fn proxy(text: &str) -> Result<ProxySetting, ValueError> {
    if text == "none" {
        return Ok(ProxySetting::Direct);
    }
    value::proxy(text)
        .map(|(host, port)| ProxySetting::Through(Proxy { host, port, authorization: None }))
}

/// The proxy for this endpoint. Loopback and Unix sockets are always dialled directly.
///
/// # Errors
///
/// Where the environment names a proxy that does not speak `CONNECT`.
pub(super) fn choose(
    setting: Option<&ProxySetting>,
    endpoint: &Endpoint,
    environment: &Environment,
) -> Result<Option<Proxy>, String> {
    let EndpointAddress::Tcp { host, port } = &endpoint.address else { return Ok(None) };
    if value::is_loopback(host) {
        return Ok(None);
    }
    match setting {
        Some(ProxySetting::Direct) => return Ok(None),
        Some(ProxySetting::Through(proxy)) => return Ok(Some(proxy.clone())),
        None => {}
    }
    let matcher = Matcher::builder()
        .https(environment.https_proxy.clone().unwrap_or_default())
        .http(environment.http_proxy.clone().unwrap_or_default())
        .all(environment.all_proxy.clone().unwrap_or_default())
        .no(environment.no_proxy.clone().unwrap_or_default())
        .build();
    let scheme = if endpoint.tls { "https" } else { "http" };
    let host = if host.contains(':') { format!("[{host}]") } else { host.clone() };
    let Ok(uri) = format!("{scheme}://{host}:{port}/").parse() else { return Ok(None) };
    let Some(found) = matcher.intercept(&uri) else { return Ok(None) };
    let at = found.uri();
    match (at.scheme_str(), at.host()) {
        (Some("http"), Some(host)) => Ok(Some(Proxy {
            host: host.trim_matches(['[', ']']).to_owned(),
            port: at.port_u16().unwrap_or(80),
            authorization: found.basic_auth().and_then(|v| v.to_str().ok()).map(str::to_owned),
        })),
        (scheme, _) => Err(format!(
            "the environment names a {} proxy (HTTPS_PROXY or ALL_PROXY), and only http:// ones \
             are spoken to: set --proxy http://HOST:PORT, or --proxy none to dial directly",
            scheme.unwrap_or("nameless")
        )),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn chosen(setting: Option<&str>, url: &str, environment: &Environment) -> Option<String> {
        let setting = setting.map(|text| proxy(text).expect("a proxy"));
        let endpoint = value::endpoint(url).expect("an endpoint");
        let proxy = choose(setting.as_ref(), &endpoint, environment).expect("a choice");
        proxy.map(|proxy| proxy.to_string())
    }

    #[test]
    fn the_environment_decides_as_it_does_for_curl() {
        let environment = Environment {
            https_proxy: Some("http://me:secret@proxy.lan:3128".to_owned()),
            no_proxy: Some("internal.example.com,10.0.0.0/8".to_owned()),
            ..Environment::default()
        };
        let through = |url| chosen(None, url, &environment);
        assert_eq!(through("wss://logs.example.org/").as_deref(), Some("proxy.lan:3128"));
        assert_eq!(through("wss://logs.internal.example.com/"), None);
        assert_eq!(through("wss://10.1.2.3/"), None);
        assert_eq!(through("wss://127.0.0.1:8443/"), None, "loopback");
        assert_eq!(through("ws+unix:/run/x.sock"), None);
        assert_eq!(through("ws://logs.example.org/"), None, "HTTP_PROXY is not set");
        let endpoint = value::endpoint("wss://logs.example.org/").expect("an endpoint");
        let proxy = choose(None, &endpoint, &environment).expect("a choice").expect("a proxy");
        assert_eq!(proxy.authorization.as_deref(), Some("Basic bWU6c2VjcmV0"));
        assert!(!format!("{proxy:?}").contains("bWU6"), "a secret is not logged");
    }

    #[test]
    fn the_flag_goes_before_the_environment() {
        let environment =
            Environment { all_proxy: Some("socks5://lan:1080".to_owned()), ..Default::default() };
        let url = "wss://logs.example.org/";
        let flag = Some("http://[2001:db8::1]:8080");
        assert_eq!(chosen(flag, url, &environment).as_deref(), Some("[2001:db8::1]:8080"));
        assert_eq!(chosen(Some("none"), url, &environment), None);
        let endpoint = value::endpoint(url).expect("an endpoint");
        let error = choose(None, &endpoint, &environment).expect_err("socks");
        assert!(error.contains("socks5"), "{error}");
        let error = proxy("http://me:secret@lan:1").expect_err("a password");
        assert!(error.to_string().contains("user or password"), "{error}");
        assert!(proxy("socks5://lan:1").is_err());
    }
}
