package receive

import (
	"net/http"
	"regexp"
)

// origin is what Event Grid calls itself when it asks whether it may send.
var origin = regexp.MustCompile(`^[A-Za-z0-9.-]{1,253}$`)

// shakeHands answers the handshake of CloudEvents' webhooks, which Event Grid
// begins with, and tells whether it was one. It lets nobody in: whoever sends is
// authenticated each time.
func shakeHands(w http.ResponseWriter, req *http.Request, r *receiver) bool {
	from := req.Header.Get("WebHook-Request-Origin")
	if req.Method != http.MethodOptions || r.config.Type != "acr" || !origin.MatchString(from) {
		return false
	}
	w.Header().Set("Allow", "POST, OPTIONS")
	w.Header().Set("WebHook-Allowed-Origin", from)
	if req.Header.Get("WebHook-Request-Rate") != "" {
		w.Header().Set("WebHook-Allowed-Rate", "*")
	}
	return true
}
