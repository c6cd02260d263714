//! WebSocket over TLS: connect, listen, close. Only this module knows tungstenite.
