//! What peers look at in a certificate that a server or client shows as its own (RFC 5280).
//!
//! For messages: rustls decides what counts.

use std::net::{Ipv4Addr, Ipv6Addr};

use jiff::Timestamp;
use x509_cert::certificate::Version;
use x509_cert::der::Decode as _;
use x509_cert::ext::pkix::name::GeneralName;
use x509_cert::ext::pkix::{BasicConstraints, SubjectAltName};
use x509_cert::{Certificate, TbsCertificate};

/// The first certificate of a chain.
#[derive(Clone, Debug)]
pub struct Leaf(Certificate);

impl Leaf {
    /// From its DER; `None` where that is no certificate of RFC 5280.
    pub fn from_der(der: &[u8]) -> Option<Leaf> {
        Certificate::from_der(der).ok().map(Leaf)
    }

    fn signed(&self) -> &TbsCertificate {
        self.0.tbs_certificate()
    }

    /// When it ends (RFC 5280 §4.1.2.5).
    pub fn not_after(&self) -> Timestamp {
        let end = self.signed().validity().not_after.to_system_time();
        Timestamp::try_from(end).unwrap_or(Timestamp::MAX)
    }

    /// The hosts it is for: host names, and addresses as text (RFC 5280 §4.2.1.6).
    pub fn names(&self) -> Vec<String> {
        let names = self.signed().get_extension::<SubjectAltName>().ok().flatten();
        names.into_iter().flat_map(|(_, names)| names.0).filter_map(|name| host(&name)).collect()
    }

    /// Why rustls refuses it from a server, whoever signed it; with what to do. Other peers may take it.
    pub fn refusal(&self) -> Option<&'static str> {
        let signed = self.signed();
        let is_authority = || {
            let constraints = signed.get_extension::<BasicConstraints>().ok().flatten();
            constraints.is_some_and(|(_, constraints)| constraints.ca)
        };
        if signed.version() != Version::V3 {
            Some(
                "is of X.509 version 1, which has no names: make one of version 3, with subjectAltName",
            )
        } else if is_authority() {
            Some(
                "is one of an authority (CA:TRUE), as openssl makes by default when it signs itself: \
                 make one with basicConstraints=critical,CA:FALSE",
            )
        } else if self.names().is_empty() {
            Some("names no host: make one with subjectAltName")
        } else {
            None
        }
    }
}

fn host(name: &GeneralName) -> Option<String> {
    match name {
        GeneralName::DnsName(name) => Some(name.to_string()),
        GeneralName::IpAddress(address) => {
            let address = address.as_bytes();
            let v4 = <[u8; 4]>::try_from(address).map(|v4| Ipv4Addr::from(v4).to_string());
            let v6 = || <[u8; 16]>::try_from(address).map(|v6| Ipv6Addr::from(v6).to_string());
            v4.or_else(|_| v6()).ok()
        }
        _ => None,
    }
}

#[cfg(test)]
mod tests {
    use rcgen::{BasicConstraints, CertificateParams, IsCa, KeyPair, date_time_ymd};

    use super::*;

    fn leaf(change: impl FnOnce(&mut CertificateParams)) -> Leaf {
        let names = ["localhost", "127.0.0.1", "::1"].map(str::to_owned);
        let mut params = CertificateParams::new(names).expect("params");
        change(&mut params);
        let certificate = params.self_signed(&KeyPair::generate().expect("key"));
        Leaf::from_der(certificate.expect("certificate").der()).expect("a leaf")
    }

    #[test]
    fn the_end_is_read_in_both_forms_of_time() {
        for year in [2019, 2049, 2050, 2090] {
            let end = leaf(|params| params.not_after = date_time_ymd(year, 3, 1)).not_after();
            assert_eq!(end.to_string(), format!("{year}-03-01T00:00:00Z"));
        }
    }

    #[test]
    fn names_are_read_as_text() {
        assert_eq!(leaf(|_| {}).names(), ["localhost", "127.0.0.1", "::1"]);
        let nameless = leaf(|params| params.subject_alt_names.clear());
        assert!(nameless.names().is_empty());
        assert!(nameless.refusal().expect("refused").contains("names no host"));
    }

    #[test]
    fn an_authoritys_certificate_is_refused_as_a_servers() {
        assert_eq!(leaf(|_| {}).refusal(), None);
        assert_eq!(leaf(|params| params.is_ca = IsCa::ExplicitNoCa).refusal(), None);
        let authority = leaf(|params| params.is_ca = IsCa::Ca(BasicConstraints::Unconstrained));
        assert!(authority.refusal().expect("refused").contains("CA:TRUE"));
    }

    #[test]
    fn bytes_that_are_no_certificate_are_none() {
        let certificate = [0x30, 0x82, 0xff, 0xff, 0x30, 0x05, 0x02];
        for length in 0..certificate.len() {
            assert!(Leaf::from_der(&certificate[..length]).is_none());
        }
    }
}
