package event

import (
	"bytes"
	"cmp"
	"encoding/json"
	"fmt"
	"strings"
)

// acr reads the webhooks of Azure Container Registry, one event each, and the
// arrays of Event Grid (in its own schema) that tell of the same events. A
// handshake of Event Grid is answered by giving back its code; the URL that it
// also holds is not asked.
func acr(d Delivery, r *Result) error {
	if !bytes.HasPrefix(bytes.TrimSpace(d.Body), []byte("[")) {
		var e registryEvent
		if err := unmarshal(d.Body, &e); err != nil {
			return err
		}
		e.add(r, cmp.Or(e.Request.Host, d.Registry))
		return nil
	}
	var grid []struct {
		ID        string          `json:"id"`
		EventType string          `json:"eventType"`
		Data      json.RawMessage `json:"data"`
	}
	if err := unmarshal(d.Body, &grid); err != nil {
		return err
	}
	for _, g := range grid {
		if r.full() {
			break
		}
		switch name := g.EventType[strings.LastIndexByte(g.EventType, '.')+1:]; name {
		case "ImagePushed", "ImageDeleted":
			var e registryEvent
			if err := unmarshal(g.Data, &e); err != nil {
				return fmt.Errorf("event %q: %w", clip(g.ID), err)
			}
			e.Action = map[string]string{"ImagePushed": "push", "ImageDeleted": "delete"}[name]
			e.ID = cmp.Or(g.ID, e.ID)
			e.add(r, cmp.Or(e.Request.Host, d.Registry))
		case "ChartPushed", "ChartDeleted":
			r.ignore(NotImage, "a chart")
		case "SubscriptionValidationEvent":
			if err := validate(g.Data, r); err != nil {
				return err
			}
		default:
			r.ignore(Foreign, "foreign event %q", clip(g.EventType))
		}
	}
	return nil
}

func validate(data []byte, r *Result) error {
	var v struct {
		ValidationCode string `json:"validationCode"`
	}
	if err := unmarshal(data, &v); err != nil {
		return err
	}
	if v.ValidationCode == "" || len(v.ValidationCode) > maxText {
		return fmt.Errorf("a handshake without a code, or with one of more than %d bytes", maxText)
	}
	reply, err := json.Marshal(map[string]string{"validationResponse": v.ValidationCode})
	if err != nil {
		return err
	}
	r.Reply = reply
	r.ignore(Handshake, "Event Grid's handshake, answered")
	return nil
}
