//! What arrived on a socket and awaits a receipt: append, sync, recover.
